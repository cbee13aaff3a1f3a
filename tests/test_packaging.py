"""The traps of mapping `mnemic` onto the repository root, each with its guard."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
TOP = ("train", "optim", "models", "recipes")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def packages_in_tree() -> set[str]:
    found = {p.parent for top in TOP for p in (ROOT / top).rglob("__init__.py")}
    return {"mnemic." + ".".join(p.relative_to(ROOT).parts) for p in found}


def test_the_package_list_is_complete():
    """A forgotten sub-package works in an editable install and is missing from the wheel."""
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages_in_tree()


def test_every_folder_with_modules_is_a_package():
    folders = {p.parent for top in TOP for p in (ROOT / top).rglob("*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders)


def test_the_root_is_no_package():
    """A root __init__.py would make `mnemic` a regular package and ship the root's YAML with it."""
    assert not (ROOT / "__init__.py").exists()


def imports_of(path: Path) -> set[str]:
    """Absolute module names a file imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("top", TOP)
def test_modules_are_imported_by_one_name_only(top):
    """`import optim` also works from the root, and its classes are not those of mnemic.optim."""
    for path in ROOT.glob(f"{top}/**/*.py"):
        assert not {name.split(".")[0] for name in imports_of(path)} & set(TOP), path


def test_arrows_point_one_way():
    def inner(top):
        return {n for p in ROOT.glob(f"{top}/**/*.py") for n in imports_of(p) if "mnemic" in n}

    outer = {n.split(".")[0] for p in ROOT.glob("optim/**/*.py") for n in imports_of(p)}
    assert outer <= {"torch", "mnemic", *sys.stdlib_module_names}
    assert all(name.startswith("mnemic.optim") for name in inner("optim"))
    assert all(name.startswith(("mnemic.optim", "mnemic.models")) for name in inner("models"))
    assert not inner("recipes")


@pytest.mark.parametrize("command", [["--help"], ["recipes", "ls"], ["schema"], ["--version"],
                                     ["validate", "r.yaml"]])  # fmt: skip
def test_light_commands_import_neither_torch_nor_transformers(tmp_path, command):
    from support import lm_tree, write_recipe

    write_recipe(tmp_path / "r.yaml", lm_tree(tmp_path))
    code = (
        "import sys\n"
        "from mnemic.train.cli import main\n"
        "try:\n    status = main(sys.argv[1:])\n"
        "except SystemExit as stop:\n    status = stop.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'accelerate', 'peft'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else status)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel pip builds from a copy of what git tracks (or would)."""
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in listed:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "-q", "--no-deps", "-w", out, source],
        check=True,
    )  # fmt: skip
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"mnemic", f"mnemic-{PROJECT['project']['version']}.dist-info"}
    modules = {n for n in names if n.endswith(".py")}
    expected = {f"mnemic/{p.relative_to(ROOT)}" for t in TOP for p in ROOT.glob(f"{t}/**/*.py")}
    assert modules == expected
    shipped = {n for n in names if n.endswith(".yaml")}
    assert shipped == {f"mnemic/{p.relative_to(ROOT)}" for p in ROOT.glob("recipes/**/*.yaml")}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_an_installed_wheel_trains(wheel, tmp_path):
    """In a fresh environment that sees our dependencies but not the checkout."""
    from support import lm_tree, rows_of, write_recipe

    env = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True)
    python = env / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    # A folder named in a .pth file is put on the path, but its own .pth files, among them the
    # editable install of this checkout, are not read.
    here = subprocess.run(
        [sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    (Path(site) / "dependencies.pth").write_text(here + "\n")
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "-q", "-q", "--no-deps",
         "--ignore-installed", wheel], check=True,
    )  # fmt: skip
    path = write_recipe(tmp_path / "r.yaml", lm_tree(tmp_path, loop={"steps": 2}))
    command = env / "bin" / "mnemic"
    where = subprocess.run(
        [python, "-c", "import mnemic.train.cli as c; print(c.__file__)"],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    ).stdout  # fmt: skip
    assert where.startswith(str(env)), where
    done = subprocess.run([command, "train", path], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(rows_of(tmp_path / "run")) == 2
    listed = subprocess.run([command, "recipes", "ls"], capture_output=True, text=True)
    assert "quickstart" in listed.stdout
