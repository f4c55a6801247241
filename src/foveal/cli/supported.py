"""Tell what can be read off a timm model.

foveal supported vit_small_patch16_dinov3
"""

import argparse


def declare(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="MODEL", help="a timm model")


def run(values: argparse.Namespace) -> int:
    """Build the model without weights and describe its attention; exit code 2 if it cannot be read."""
    import timm
    import torch

    from foveal.attention import supported
    from foveal.train.models import check_name

    check_name(values.model)
    try:
        with torch.device("meta"):  # the structure is asked, so no memory is needed for weights
            model = timm.create_model(values.model, pretrained=False)
    except (RuntimeError, NotImplementedError):  # some models compute while they are built
        model = timm.create_model(values.model, pretrained=False)
    support = supported(model)
    if not support:
        print(f"{values.model}: cannot be read: {support.reason}")
        return 2
    print(f"{values.model}: {len(support.layers)} layers ({support.layers[0]} ... {support.layers[-1]})")
    print(f"layout: {support.layout}")
    what = dict.fromkeys(value for values in support.what.values() for value in values)
    print(f"can be read: {', '.join(what)}")
    return 0
