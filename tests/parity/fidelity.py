"""torch-fidelity, imported without torchvision, which it needs only for data sets and networks not used here."""

import importlib.util
import sys
import types

NAMES = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")


def import_torch_fidelity():
    """The package. If torchvision is missing, empty modules stand in for it during the import."""
    absent = importlib.util.find_spec("torchvision") is None
    if absent:
        modules = {name: types.ModuleType(name) for name in NAMES}
        for name in NAMES[1:]:
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, modules[name])
        for dataset in ("CIFAR10", "CIFAR100", "STL10"):  # subclassed at import
            setattr(modules["torchvision.datasets"], dataset, object)
        sys.modules.update(modules)
    import torch_fidelity

    if absent:  # other packages check whether there is a torchvision
        for name in NAMES:
            del sys.modules[name]
    return torch_fidelity
