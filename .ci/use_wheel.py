"""Check the package that is installed, by its version, and use it as a script of somebody else's would."""

import importlib.metadata
import sys
from pathlib import Path

import torch

import specscale


def check_files(version: str) -> None:
    assert specscale.__version__ == importlib.metadata.version("specscale") == version
    assert Path(sys.prefix) in Path(specscale.__file__).parents, specscale.__file__
    files = importlib.metadata.files("specscale")
    assert files is not None
    # pip compiles the modules, and adds files of its own to the metadata.
    names = {str(file) for file in files}
    assert {name.split("/")[0] for name in names} == {"specscale", f"specscale-{version}.dist-info"}, names
    assert {"specscale/py.typed", f"specscale-{version}.dist-info/licenses/LICENSE"} <= names


def train(norm: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(90, 80), torch.nn.ReLU(), torch.nn.Linear(80, 10))
    names = list(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scaling = specscale.apply_norm_scaling(model, norm, init="orthogonal")
    scaling.attach(optimizer)
    inputs, labels = torch.randn(32, 90), torch.randint(10, (32,))
    for _ in range(5):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        check_norms(norm, scaling.audit())
    print(scaling)
    metrics = scaling.metrics()
    assert metrics["target/0"] > 0
    torch.save(model.state_dict(), "scaled.pt")
    output = model(inputs)
    assert scaling.remove() is model
    assert list(model.state_dict()) == names
    assert torch.equal(model(inputs), output)


def check_norms(norm: str, audit: specscale.Audit) -> None:
    assert audit.miss == 0
    if norm == "frobenius":
        assert all(abs(one.excess) < 1e-6 for one in audit.certificates), audit
    elif norm == "cap":
        assert audit.worst_excess < 1e-3, audit
    else:
        # Spectral scaling moves the first singular value alone: the second may be above the target.
        assert audit.worst_error < 1e-3, audit


if __name__ == "__main__":
    check_files(sys.argv[1])
    for norm in ("frobenius", "cap", "spectral"):
        train(norm)
