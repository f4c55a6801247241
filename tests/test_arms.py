"""Arms from words: every combination, names for folders, a baseline for each label fraction, clear refusals."""

import re

import pytest
import torch

from foveal.cli import sweep
from foveal.train import Settings, SettingsError
from foveal.train.arms import arms_of
from foveal.train.models import build, class_pool

COMMON = {"data": "digits", "init": "demo", "model": "demo"}


def test_every_combination_and_the_first_of_each_fraction_is_the_baseline():
    arms = arms_of(COMMON, ["none", "cutmix"], ["none", "gta"], [0.15, 1])
    assert list(arms.settings) == [
        *("none-15%", "none+gta-15%", "cutmix-15%", "cutmix+gta-15%"),
        *("none", "none+gta", "cutmix", "cutmix+gta"),
    ]
    assert arms.baseline_of == {
        **dict.fromkeys(("none+gta-15%", "cutmix-15%", "cutmix+gta-15%"), "none-15%"),
        **dict.fromkeys(("none+gta", "cutmix", "cutmix+gta"), "none"),
    }
    found = arms.settings["cutmix+gta-15%"]
    assert (found.mix, found.guide, found.label_fraction) == ("cutmix", "gta", 0.15)
    assert arms.settings["cutmix"].label_fraction is None  # all labels: the same run as without --label-fraction


def test_the_baseline_is_the_first_whatever_it_is():
    arms = arms_of(COMMON, ["transmix", "none"], ["gta", "none"], [None])
    assert arms.baseline_of == dict.fromkeys(["transmix", "none+gta", "none"], "transmix+gta")


def test_names_do_not_depend_on_what_else_is_listed():
    alone = arms_of(COMMON, ["cutmix:prob=0.5"], ["none"], [None]).settings
    among = arms_of(COMMON, ["none", "cutmix:prob=0.5"], ["none", "gta"], [0.5, 1]).settings
    assert alone["cutmix-prob=0.5"] == among["cutmix-prob=0.5"]


def test_words_after_the_colon():
    text = "tdattenmix:map=label_biased,map.sigma=0.5,beta=1e-1,map_model=frozen,map_warmup=2"
    (name, found), *_ = arms_of(COMMON, [text], ["gta:weight=10"], [None]).settings.items()
    assert name == "tdattenmix-label_biased-sigma=0.5-beta=1e-1-map_model=frozen-map_warmup=2+gta-weight=10"
    assert (found.mix, found.mix_args) == ("tdattenmix", {"beta": 0.1})  # YAML alone would read 1e-1 as text
    assert (found.map, found.map_args) == ("label_biased", {"sigma": 0.5})
    assert (found.map_model, found.map_warmup, found.guide_weight) == ("frozen", 2, 10.0)
    assert re.fullmatch(r"[\w.+=%-]+", name)


def test_words_of_a_guide():
    words = (
        "gta:weight=10,schedule=cosine,layers=[2, 3],match=centred,tune=lora,tune.targets=[qkv,proj],head_start=probe"
    )
    (name, found), *_ = arms_of(COMMON, ["none"], [words], [None]).settings.items()
    assert name == (
        "none+gta-weight=10-schedule=cosine-layers=2_3-match=centred-tune=lora-tune.targets=qkv_proj-head_start=probe"
    )
    assert (found.guide_weight, found.guide_schedule, found.head_start) == (10.0, "cosine", "probe")
    assert found.guide_args == {"layers": [2, 3], "match": "centred"}
    assert (found.tune, found.tune_args) == ("lora", {"targets": ["qkv", "proj"]})
    (name, found), *_ = arms_of(COMMON, ["none"], ["none:tune=last-1"], [None]).settings.items()
    assert (name, found.guide, found.tune) == ("none+tune=last-1", "none", "last-1")


def test_tokens_mixed_on_top():
    (name, found), *_ = arms_of(
        COMMON, ["cutmix:token_mix=horizontal,token.rho_unit=mean"], ["none"], [None]
    ).settings.items()
    assert name == "cutmix-horizontal-rho_unit=mean"
    assert (found.mix, found.token_mix, found.token_mix_args) == ("cutmix", "horizontal", {"rho_unit": "mean"})


def test_names_of_values_that_are_no_names():
    (name,) = arms_of(COMMON, ["tdattenmix:map_model=runs/my guide"], ["none"], [None]).settings
    assert name == "tdattenmix-map_model=runs_my_guide"


def test_a_recipe_says_what_its_own_mixer_is():
    recipe = {
        "mix": "tdattenmix",
        "mix_args": {"beta": 0.3, "prob": 1.0},
        "map": "label_biased",
        "map_args": {"sigma": 2},
    }
    texts = ["none", "tdattenmix", "tdattenmix:beta=0.9", "tdattenmix:map=received_attention", "cutmix"]
    arms = arms_of(COMMON, texts, ["none"], [None], recipe).settings
    own = arms["tdattenmix"]
    assert (own.mix_args, own.map, own.map_args) == ({"beta": 0.3, "prob": 1.0}, "label_biased", {"sigma": 2})
    assert arms["tdattenmix-beta=0.9"].mix_args == {"beta": 0.9, "prob": 1.0}
    other = arms["tdattenmix-received_attention"]
    assert (other.map, other.map_args) == ("received_attention", {})  # sigma is a setting of another map
    assert (arms["cutmix"].mix_args, arms["cutmix"].map) == ({}, None)


def test_tokens_of_a_recipe_and_of_all_arms():
    recipe = {"mix": "cutmix", "token_mix": "horizontal", "token_mix_args": {"rho": 0.01, "horizontal": 1}}
    texts = ["none", "cutmix", "cutmix:token.rho=0.02", "cutmix:token_mix=manifold", "cutmix:token_mix=none"]
    plain, own, more, other, without = arms_of(COMMON, texts, ["none"], [None], recipe).settings.values()
    assert (plain.token_mix, own.token_mix) == ("none", "horizontal")
    assert own.token_mix_args == recipe["token_mix_args"]
    assert more.token_mix_args == {"rho": 0.02, "horizontal": 1}
    assert (other.token_mix, other.token_mix_args) == ("manifold", {})
    assert (without.token_mix, without.token_mix_args) == ("none", {})
    for found in arms_of(COMMON | {"token_mix": "vertical"}, ["none", "cutmix"], ["none"], [None]).settings.values():
        assert found.token_mix == "vertical"


def test_maps_given_for_all_hold_for_those_that_follow_one():
    arms = arms_of(
        COMMON | {"map": "received_attention", "map_warmup": 1}, ["none", "smmix"], ["none"], [None]
    ).settings
    assert (arms["smmix"].map, arms["smmix"].map_warmup, arms["none"].map) == ("received_attention", 1, None)
    with pytest.raises(SettingsError, match="map is given, but no arm"):
        arms_of(COMMON | {"map": "received_attention"}, ["none", "cutmix"], ["none"], [None])


@pytest.mark.parametrize(
    ("mixes", "guides", "fractions", "message"),
    [
        (["cutmx"], ["none"], [None], "unknown mixer 'cutmx': did you mean 'cutmix'"),
        (["cutmix:prb=1"], ["none"], [None], "unknown setting of cutmix 'prb': did you mean 'prob'"),
        (["cutmix:prob"], ["none"], [None], "arm 'cutmix:prob' does not fit: write name:key=value"),
        (["cutmix:"], ["none"], [None], "arm 'cutmix:' does not fit"),
        (["cutmix:prob=1,prob=0.5"], ["none"], [None], "gives prob twice"),
        (["cutmix:map=head_cosine"], ["none"], [None], "mix=cutmix follows no map"),
        (["tdattenmix:map=head_cosin"], ["none"], [None], "unknown map 'head_cosin': did you mean 'head_cosine'"),
        (["tdattenmix:map.sgma=1"], ["none"], [None], "unknown setting of map"),
        (["tdattenmix:map_args=1"], ["none"], [None], "unknown setting of tdattenmix 'map_args'"),
        (["none"], ["gtaa"], [None], "unknown guide 'gtaa': did you mean 'gta'"),
        (["none"], ["gta:wight=1"], [None], "unknown setting of guide gta 'wight': did you mean 'weight'"),
        (["none"], ["none:weight=1"], [None], "unknown setting of guide none 'weight'"),
        (["none", "none"], ["none"], [None], "arm none is listed twice"),
        (["none"], ["none"], [0.5, 0.50], "arm none-50% is listed twice"),
        (["none"], ["none"], [1.5], "label_fraction=1.5 does not fit"),
    ],
)
def test_what_cannot_be_meant(mixes, guides, fractions, message):
    with pytest.raises(SettingsError, match=re.escape(message)):
        arms_of(COMMON, mixes, guides, fractions)


# -- one model for all arms

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
AVERAGING = {"data": "digits", "init": "none", "model": "eva02_tiny_patch14_224", "model_args": SMALL}
DINO = {**AVERAGING, "model": "vit_small_patch16_dinov3"}
GTA = "gta:source=none"  # a random source: init=none has no other


@pytest.mark.parametrize("common", [AVERAGING, DINO])
def test_where_some_arm_guides_the_class_token_all_classifiers_read_it(common):
    guides = ["none", "none:tune=head", "l2_sp:source=none", GTA, "gta:source=none,query=mean"]
    arms = arms_of(common, ["none"], guides, [0.5, 1])
    models = {name: build(one, 10) for name, one in arms.settings.items()}
    assert {built.model.global_pool for built in models.values()} == {"token"}
    assert len({str(sorted(built.arguments.items())) for built in models.values()}) == 1
    plain, guided = (models[name].model.state_dict() for name in ("none", "none+gta-source=none"))
    assert list(plain) == list(guided)
    assert all(torch.equal(plain[name], guided[name]) for name in plain)
    assert arms.pool.items() <= arms.settings["none"].model_args.items()
    assert SMALL.items() <= arms.settings["none"].model_args.items()


def test_the_norm_stays_behind_the_pool():
    assert arms_of(AVERAGING, ["none"], ["none", GTA], [None]).pool == {"global_pool": "token", "use_fc_norm": True}
    normed = {**DINO, "model_args": {**SMALL, "use_fc_norm": False}}
    assert arms_of(normed, ["none"], ["none", GTA], [None]).pool == {"global_pool": "token"}


@pytest.mark.parametrize(
    ("common", "guides"),
    [
        (AVERAGING, ["none", "l2_sp:source=none", "gta:source=none,query=mean"]),
        (AVERAGING, ["none", "gta:source=none,average_pooled=true"]),
        ({**AVERAGING, "model_args": {**SMALL, "global_pool": "avg"}}, ["none", GTA]),
        ({**AVERAGING, "model": "vit_tiny_patch16_224"}, ["none", GTA]),  # reads its class token anyway
        ({**AVERAGING, "model": "resnet10t", "model_args": {}}, ["none", GTA]),  # has none
    ],
)
def test_a_model_is_left_as_it_is_where_no_guide_needs_another(common, guides):
    arms = arms_of(common, ["none"], guides, [None])
    assert arms.pool == {}
    assert {str(one.model_args) for one in arms.settings.values()} == {str(common["model_args"])}


def test_asking_for_the_pool_makes_no_weights_and_draws_nothing():
    before = torch.random.get_rng_state()
    huge = Settings.from_dict(
        {**AVERAGING, "guide": "gta", "guide_source": "none", "model_args": {"embed_dim": 48_000}}
    )
    assert class_pool(huge)["global_pool"] == "token"  # more than a terabyte of weights
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(SettingsError, match="unknown model 'eva02_tny_patch14_224'"):
        arms_of({**AVERAGING, "model": "eva02_tny_patch14_224"}, ["none"], ["none", GTA], [None])


def test_a_sweep_that_finds_no_weight_keeps_the_model_it_was_swept_on():
    swept = Settings.from_dict(
        {**AVERAGING, "guide": "gta", "guide_source": "none", "guide_args": {"match": "centred"}}
    )
    plain = sweep._plain(swept)
    assert (plain.guide, plain.guide_args, plain.guide_source) == ("none", {}, "init")
    assert build(plain, 10).arguments == build(swept, 10).arguments
