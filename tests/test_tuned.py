"""Which parameters are tuned: rules on names."""

import pytest
import timm
import torch
from torch import nn

import foveal.models  # noqa: F401  CCT
from foveal.transfer.tuned import Chosen, choose, classifier_names, freeze

VIT = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}


def vit(**more):
    return timm.create_model("vit_tiny_patch16_224", **(VIT | more))


def swin():
    sizes = {"img_size": 32, "window_size": 2, "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2)}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **sizes)


def weights(model, names):
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    return sum(sizes[name] for name in names)


@pytest.mark.parametrize("tune", ["all", "head", "attention", "bias", "last-1", "last-2"])
@pytest.mark.parametrize("make", [vit, swin])
def test_trained_and_frozen_are_all_in_the_order_of_the_model(make, tune):
    model = make()
    names = [name for name, _ in model.named_parameters()]
    chosen = choose(model, tune)
    assert sorted(chosen.trained + chosen.frozen, key=names.index) == names
    assert list(chosen.trained) == sorted(chosen.trained, key=names.index)
    assert set(classifier_names(model)) <= set(chosen.trained)
    assert bool(chosen.frozen) == (tune != "all")


def test_attention_follows_the_rule_of_the_paper():
    model = vit(init_values=1e-5, qk_norm=True, reg_tokens=2)
    expected = ["pos_embed"]
    for block in range(3):
        parts = ("qkv.weight", "qkv.bias", "q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias")
        expected += [f"blocks.{block}.attn.{part}" for part in (*parts, "proj.weight", "proj.bias")]
    chosen = choose(model, "attention")
    assert list(chosen.trained) == [*expected, "head.weight", "head.bias"]
    assert {"cls_token", "reg_token", "patch_embed.proj.weight", "norm.weight"} <= set(chosen.frozen)
    assert {"blocks.0.ls1.gamma", "blocks.0.norm1.bias", "blocks.0.mlp.fc1.weight"} <= set(chosen.frozen)


def test_attention_takes_the_head_that_pools_by_attention():
    mapped = choose(vit(global_pool="map", class_token=False), "attention")
    assert {"attn_pool.latent", "attn_pool.q.weight", "attn_pool.kv.weight"} <= set(mapped.trained)
    compact = choose(timm.create_model("cct_2_3x2_32", num_classes=5), "attention")
    assert any(name.startswith("seq_pool.") for name in compact.trained)
    assert "pos_embed" in compact.trained


def test_attention_takes_both_classifiers_of_a_distilled_model():
    model = timm.create_model("deit_tiny_distilled_patch16_224", **VIT)
    assert classifier_names(model) == ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")
    for tune in ("head", "attention", "bias", "last-1"):
        assert set(classifier_names(model)) <= set(choose(model, tune).trained)


def test_share_of_attention_weights_in_vit_small():
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_224", num_classes=200)
    every = weights(model, [name for name, _ in model.named_parameters()])
    within = weights(model, [name for name in choose(model, "attention").trained if ".attn." in name])
    assert (round(within / 1e6, 2), round(every / 1e6, 1)) == (7.10, 21.7)
    assert round(100 * within / every, 1) == 32.6


def test_biases_of_vit_small_are_a_quarter_percent():
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_224")
    biases = [name for name in choose(model, "bias").trained if name != "head.weight"]
    # 12 blocks: two norms, qkv, proj, fc1, fc2; patch embedding, final norm, 1000 classes
    assert weights(model, biases) == 12 * (4 * 384 + 3 * 384 + 1536) + 2 * 384 + 1000 == 52_456
    every = weights(model, [name for name, _ in model.named_parameters()])
    assert round(100 * weights(model, biases) / every, 2) == 0.24


def test_bias_counts_query_and_value_bias_but_no_table_of_relative_positions():
    model = timm.create_model("beit_base_patch16_224", **(VIT | {"depth": 1}))
    trained = choose(model, "bias").trained
    assert {"blocks.0.attn.q_bias", "blocks.0.attn.v_bias"} <= set(trained)
    assert all(name.endswith("bias") or name == "head.weight" for name in trained)
    assert "blocks.0.attn.relative_position_bias_table" in choose(model, "bias").frozen


def test_last_takes_blocks_from_the_end_and_what_follows():
    model = vit()
    after = {name.rpartition(".")[0] for name in choose(model, "last-1").trained if "blocks" not in name}
    assert after == {"norm", "head"}
    for k in (1, 2, 3):
        blocks = {name.split(".")[1] for name in choose(model, f"last-{k}").trained if name.startswith("blocks")}
        assert blocks == {str(i) for i in range(3 - k, 3)}
    stem = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert set(choose(model, "last-3").frozen) == stem


def test_last_takes_no_part_of_the_stem_that_the_model_groups_with_its_head():
    model = timm.create_model("vit_base_patch16_rope_mixed_224", **VIT)
    assert "rope.freqs" in choose(model, "last-3").frozen


def test_last_counts_the_blocks_of_all_stages():
    trained = choose(swin(), "last-3").trained
    places = {".".join(name.split(".")[:4]) for name in trained if ".blocks." in name}
    assert places == {"layers.0.blocks.1", "layers.1.blocks.0", "layers.1.blocks.1"}


@pytest.mark.parametrize("tune", ["last-0", "last-4"])
def test_last_of_blocks_that_are_not_there(tune):
    with pytest.raises(ValueError, match=f"{tune}.*has 3 blocks"):
        choose(vit(), tune)


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ("atention", "did you mean 'attention'"),
        ("last-x", "did you mean 'last-K'"),
        ("", "there are all, head, attention, bias, last-K, lora"),
        ("lora", "transfer.lora.inject"),
    ],
)
def test_unknown_words_name_the_nearest(tune, message):
    with pytest.raises(ValueError, match=message):
        choose(vit(), tune)


def test_rules_that_find_nothing_beside_the_classifier():
    resnet = timm.create_model("resnet18", num_classes=5)
    assert choose(resnet, "head").trained == ("fc.weight", "fc.bias")
    with pytest.raises(ValueError, match=r"attention.*ResNet"):
        choose(resnet, "attention")
    bare = nn.Sequential(nn.Linear(4, 4, bias=False))
    bare.append(nn.Linear(4, 2))
    bare.get_classifier = lambda: bare[1]
    with pytest.raises(ValueError, match="finds no bias"):
        choose(bare, "bias")
    with pytest.raises(ValueError, match="timm model"):
        choose(bare, "last-1")


@pytest.mark.parametrize("tune", ["head", "attention", "bias", "last-1"])
def test_a_model_without_classifier_is_refused(tune):
    with pytest.raises(ValueError, match="num_classes above 0"):
        choose(vit(num_classes=0), tune)


@pytest.mark.parametrize("tune", ["head", "attention", "bias", "last-1"])
def test_frozen_weights_stay_and_trained_ones_move(tune):
    torch.manual_seed(0)
    model = vit()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    chosen = freeze(model, tune)
    assert isinstance(chosen, Chosen)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == list(chosen.trained)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1).step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(chosen.trained)


def test_freezing_again_starts_over_and_refusal_changes_nothing():
    model = vit()
    freeze(model, "head")
    with pytest.raises(ValueError, match="not known"):
        freeze(model, "hed")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    freeze(model, "all")
    assert all(p.requires_grad for p in model.parameters())
