"""torch.hub entry points: the networks of this repository for programs that have nothing else of it.

    import torch
    network = torch.hub.load("<owner>/<repository>", "resnet20_binary", pretrained=True)
    network = torch.hub.load("<folder of a clone>", "resnet20_binary", source="local", pretrained=True)

What comes back is a plain `torch.nn.Module`. The program may have packages named `models` and `engine` itself.
"""

import contextlib
import pathlib
import sys

import torch

dependencies = ["torch", "numpy"]

_ROOT = pathlib.Path(__file__).resolve().parent

# Entry point -> file in pretrained/, accuracy in per cent on the 10,000 test images of CIFAR-10.
_PRETRAINED = {
    "resnet20": ("resnet20_float.pth", 92.60),
    "resnet20_binary": ("resnet20_binary_1bit.pth", 91.49),
    "resnet56": ("resnet56_float.pth", 93.71),
    "resnet56_binary": ("resnet56_binary_1bit.pth", 92.51),
}

_DOCSTRING = """{title}; on the CPU, in evaluation mode.

The input is float32 (N, 3, 32, 32): RGB pixels from 0 to 1, then normalized, (x - mean) / std, with
mean (0.4914, 0.4822, 0.4465) and std (0.2470, 0.2435, 0.2616). The output is float32 (N, 10): logits of airplane,
automobile, bird, cat, deer, dog, frog, horse, ship, truck.

pretrained: {pretrained}
Source: He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", 2015, section 4.2{source}.
"""


def _entry_point(name):
    """The function torch.hub calls for `name`, documented from the table above."""

    def load(pretrained=False):
        return _load(name, pretrained)

    arch, _, binary = name.partition("_")
    weights = "every convolution and classifier weight -1 or +1" if binary else "in full precision"
    title = f"ResNet-{arch.removeprefix('resnet')} for CIFAR-10, {weights}"
    if name in _PRETRAINED:
        file, accuracy = _PRETRAINED[name]
        words = f"load the weights of pretrained/{file}, {accuracy:.2f} % on the 10,000 test images;\n    with False"
    else:
        words = "True raises ValueError, because no trained file is shipped; with False"
    load.__name__ = load.__qualname__ = name
    load.__doc__ = _DOCSTRING.format(
        title=title,
        pretrained=f"{words} the weights are random{', binarized' if binary else ''}.",
        source=';\nCourbariaux, Bengio and David, "BinaryConnect", 2015' if binary else "",
    )
    return load


def _load(name, pretrained):
    if pretrained and name not in _PRETRAINED:
        trained = ", ".join(_PRETRAINED)
        raise ValueError(f"{name}: no trained file in pretrained/; use pretrained=False, or one of {trained}")
    with _own_models():
        from models import build
        from models.binaryconnect import binarize_model
        from models.bitpack import unpack_model

        if not pretrained:
            network = build(name.removesuffix("_binary"))
            if name.endswith("_binary"):
                binarize_model(network)
            return network.eval()
        file = torch.load(_ROOT / "pretrained" / _PRETRAINED[name][0], map_location="cpu", weights_only=True)
        if "signs" in file:
            return unpack_model(file, fold=False)
        network = build(file["arch"])
        network.load_state_dict(file["state_dict"])
        return network.eval()


@contextlib.contextmanager
def _own_models():
    """Inside, `models` is the package of this repository. Afterwards the program's own `models` is back, if any.

    A network keeps the functions it needs, so it works afterwards too. Only pickling one whole looks `models` up.
    """
    theirs, path = _modules_of_models(), sys.path[:]
    for name in theirs:
        del sys.modules[name]
    sys.path.insert(0, str(_ROOT))
    try:
        yield
    finally:
        for name in _modules_of_models():
            del sys.modules[name]
        sys.modules.update(theirs)
        sys.path[:] = path


def _modules_of_models():
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "models"}


resnet20 = _entry_point("resnet20")
resnet20_binary = _entry_point("resnet20_binary")
resnet32 = _entry_point("resnet32")
resnet32_binary = _entry_point("resnet32_binary")
resnet44 = _entry_point("resnet44")
resnet44_binary = _entry_point("resnet44_binary")
resnet56 = _entry_point("resnet56")
resnet56_binary = _entry_point("resnet56_binary")
resnet110 = _entry_point("resnet110")
resnet110_binary = _entry_point("resnet110_binary")
