"""Settings: one word for argument, flag and recipe key, checked once, with errors that help."""

import re
from pathlib import Path

import pytest

from foveal.cli.flags import Parser
from foveal.cli.train import declare, settings_of
from foveal.train import PretrainSettings, Settings, SettingsError
from foveal.train.names import unknown
from foveal.train.plain import defaults, docs, hints


def parsed(words: list[str]) -> Settings:
    parser = Parser(prog="foveal train")
    declare(parser)
    return settings_of(parser.parse_args(words))


CHANGED = Settings(
    data="PHOTOS/a b",
    data_seed=None,
    label_fraction=0.15,
    model_args={"depth": 4, "act_layer": "relu"},
    mix="mixup+cutmix",
    mix_args={"mixup_alpha": 0.2, "mode": "elem"},
    lr=1e-4,
    crop_scale=(0.5, 1.0),
    flip=False,
    randaugment=True,
    warmup_epochs=0,
    precision="bfloat16",
    name="12",
)


@pytest.mark.parametrize("settings", [Settings(data="digits"), CHANGED])
def test_a_recipe_gives_the_settings_again(settings: Settings, tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(settings.to_yaml(), encoding="utf-8")
    assert Settings.from_yaml(path) == settings


@pytest.mark.parametrize("settings", [Settings(data="digits"), CHANGED])
def test_the_command_gives_the_settings_again(settings: Settings):
    import shlex

    program, command, *words = shlex.split(settings.command())
    assert (program, command) == ("foveal", "train")
    assert parsed(words) == settings


def test_every_setting_has_a_line_that_explains_it():
    assert docs(Settings).keys() == hints(Settings).keys() == defaults(Settings).keys()
    assert all(doc and "\n" not in doc for doc in docs(Settings).values())


def test_flags_go_before_the_recipe_and_that_before_the_defaults(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("# gives nothing, at once\ndata: digits\nlr: 1e-3\nepochs: 7\n")
    settings = parsed(["--config", str(recipe), "--lr", "2e-4"])
    assert (settings.data, settings.lr, settings.epochs) == ("digits", 2e-4, 7)
    assert settings.batch_size == Settings().batch_size
    assert parsed(["scenes", "--config", str(recipe)]).data == "scenes"


def test_numbers_as_yaml_reads_them():
    assert Settings.from_dict({"lr": "5e-4"}).lr == 5e-4  # YAML 1.1 takes 5e-4 for text
    assert Settings.from_dict({"lr": 1}).lr == 1.0
    assert Settings(crop_scale=[0.3, 1]).crop_scale == (0.3, 1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lable_fraction": 0.1}, "unknown setting 'lable_fraction': did you mean 'label_fraction'"),
        ({"mix": "transmx"}, "unknown mixer 'transmx': did you mean 'transmix'"),
        ({"mix": "cutmix", "mix_args": {"porb": 1}}, "unknown setting of cutmix 'porb': did you mean 'prob'"),
        ({"mix": "cutmix", "mix_args": {"prob": -1}}, "mix=cutmix: prob"),
        ({"mix_args": {"prob": 1}}, "unknown setting of none 'prob'"),
        ({"guide": "gtaa"}, "unknown guide 'gtaa': did you mean 'gta'"),
        ({"guide": "gta", "init": "none"}, "init=none is random"),
        ({"precision": "bf16"}, "unknown precision 'bf16'"),
        ({"epochs": 0}, "epochs must be 1 or more"),
        ({"epochs": 2.5}, "expected a whole number"),
        ({"epochs": True}, "expected a whole number"),
        ({"lr": 0}, "lr must be above 0"),
        ({"lr": "fast"}, "lr='fast' does not fit: expected a number"),
        ({"lr": float("nan")}, "expected a number"),
        ({"randaugment": "yes please"}, "expected true or false"),
        ({"label_fraction": 0.1, "per_class": 3}, "give one"),
        ({"label_fraction": 1.5}, "in (0, 1]"),
        ({"warmup_epochs": 5, "epochs": 5}, "must be below epochs=5"),
        ({"crop_scale": [0.5]}, "expected 2 numbers"),
        ({"crop_scale": [0.9, 0.1]}, "0 < low <= high <= 1"),
        ({"name": "a/b"}, "must be a folder name"),
        ({"model_args": 3}, "expected a dictionary"),
    ],
)
def test_wrong_settings_say_what_fits(values: dict, message: str):
    with pytest.raises(SettingsError) as told:
        Settings.from_dict(values)
    assert message in str(told.value)


@pytest.mark.parametrize(
    ("content", "message"), [("[1, 2]", "not a recipe"), ("a: [", "not YAML"), ("", "not a recipe")]
)
def test_files_that_are_no_recipes(tmp_path: Path, content: str, message: str):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(SettingsError, match=message):
        Settings.from_yaml(path)
    with pytest.raises(SettingsError, match="cannot read the recipe"):
        Settings.from_yaml(tmp_path / "other.yaml")


def test_the_folder_is_named_after_what_one_compares():
    settings = Settings(data="some/PHOTOS/", mix="transmix", guide="gta", seed=3)
    assert settings.folder == Path("runs/PHOTOS-vit_small_patch16_224-transmix-gta-seed3")
    assert settings.replace(out="/x", name="y").folder == Path("/x/y")


def test_unknown_names_without_a_near_one_list_all():
    assert unknown("mixer", "blend", ["cutmix", "transmix"]) == "unknown mixer 'blend' (known: cutmix, transmix)"


@pytest.mark.parametrize("recipe", sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_are_settings_and_say_what_to_expect(recipe: Path):
    kind = PretrainSettings if recipe.stem.startswith("pretrain") else Settings
    settings = kind.from_yaml(recipe)
    assert settings.data
    opening = recipe.read_text().partition("\ndata:")[0]
    assert opening.startswith("# ")
    assert re.search("Expected: |Should give", opening)
    assert re.search("Time: |minute|hour", opening)
    assert f"foveal {kind.COMMAND} --config recipes/{recipe.name}" in opening


TOKEN_RECIPES = [
    recipe
    for recipe in sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
    if "token_mix:" in recipe.read_text()
]


@pytest.mark.parametrize("recipe", TOKEN_RECIPES, ids=lambda p: p.stem)
def test_token_mixing_of_recipes_fits_their_models(recipe: Path):
    import timm
    import torch

    import foveal.models
    from foveal.mix import MIXERS, TokenMixup, token_mixer

    settings = Settings.from_yaml(recipe)
    assert settings.model in (*foveal.models.NAMES, "vit_base_patch16_224.orig_in21k_ft_in1k")
    with torch.device("meta"):  # sizes alone
        model = timm.create_model(settings.model, **settings.model_args)
        mixer = token_mixer(settings.token_mix, MIXERS[settings.mix](**settings.mix_args), **settings.token_mix_args)
        assert isinstance(mixer, TokenMixup)
        assert (mixer.learned(model, 10) is None) == (settings.token_mix == "vertical")
    blocks = mixer.blocks(model)
    if mixer.vertical is not None:
        blocks.check_extend(blocks.position(mixer.vertical))
        assert mixer.vertical > 0
        assert 0 < mixer.kappa <= model.patch_embed.num_patches


def test_the_guided_recipe_is_the_demo():
    from foveal.demo import arms

    recipe = Path(__file__).parents[1] / "recipes" / "scenes_guided.yaml"
    assert Settings.from_yaml(recipe) == arms()["guided"]
