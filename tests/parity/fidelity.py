"""torch-fidelity, imported without torchvision, which it needs for data sets and networks that are not used here."""

import importlib.util
import sys
import types


def import_torch_fidelity():
    """The package; where torchvision is absent, with empty modules in its place."""
    if importlib.util.find_spec("torchvision") is None:
        names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
        modules = {name: types.ModuleType(name) for name in names}
        for name in names[1:]:
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, modules[name])
        for dataset in ("CIFAR10", "CIFAR100", "STL10"):  # subclassed at import
            setattr(modules["torchvision.datasets"], dataset, object)
        sys.modules.update(modules)
    import torch_fidelity

    return torch_fidelity
