"""What can run what a file says is called nowhere in the package, but in the modules that are there to tame it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "nemo_spin"

# Names, as they are written in code or at the end of a longer one.
NOWHERE = """
    eval exec compile __import__ input breakpoint os.system os.popen
    pickle.load pickle.Unpickler dill.load cloudpickle.load joblib.load marshal.load marshal.loads
    shelve.open yaml.unsafe_load yaml.full_load yaml.load_all yaml.Loader yaml.UnsafeLoader
    shutil.unpack_archive tarfile.is_tarfile
    instantiate hydra.utils.instantiate hydra.utils.get_class hydra.utils.get_object
    """.split()
# Methods of any object.
METHODS = ("extractall", "unsafe_load")
# Name -> the modules that may use it, and why.
ONLY_IN = {
    "yaml.load": {"model_io/untrusted/plain_data.py"},  # with a SafeLoader of its own
    "pickle._Unpickler": {"model_io/untrusted/inert_pickle.py"},  # whose instructions it replaces
    "OmegaConf.load": {
        "model_io/nemo_connector.py",
        "commands/doctor.py",
    },  # the user's own configurations, which may be resolved
    "dist_checkpointing.load": {"checkpoint/manager.py"},  # a run's own checkpoints
    "pickle.loads": {"checkpoint/background.py"},  # what a run's own processes tell each other, as torch does
    "tarfile.open": {"model_io/nemo1/archive.py"},  # to write
}
FORBIDDEN = {name: set() for name in NOWHERE} | ONLY_IN
# Keywords that a call must have, and must not have.
WITH = {"torch.load": ("weights_only", True)}
NEVER = {("trust_remote_code", True), ("weights_only", False), ("shell", True), ("allow_pickle", True)}


def problems(source: str, module: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Attribute, ast.Name)):
            found += [(node, name) for name in [ast.unparse(node)] if is_forbidden(name, module)]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(node, name) for name in names if is_forbidden(name, module)]
        elif isinstance(node, ast.Call):
            values = {each.arg: each.value.value for each in node.keywords if isinstance(each.value, ast.Constant)}
            name = ast.unparse(node.func)
            if name in WITH and values.get(WITH[name][0]) is not WITH[name][1]:
                found.append((node, f"{name} without {WITH[name][0]}={WITH[name][1]}"))
            found += [(node, pair) for pair in NEVER & set(values.items())]
        elif isinstance(node, ast.Dict):
            # What is written into the settings of others.
            pairs = zip(node.keys, node.values, strict=True)
            found += [(node, key.value) for key, value in pairs if is_constant(key, value, NEVER)]
    return [f"{module}:{node.lineno}: {what}" for node, what in found]


def is_forbidden(name: str, module: str) -> bool:
    if name.rpartition(".")[2] in METHODS and "." in name:
        return True
    return any(
        module not in allowed and (name == forbidden or ("." in forbidden and name.endswith(f".{forbidden}")))
        for forbidden, allowed in FORBIDDEN.items()
    )


def is_constant(key: ast.AST | None, value: ast.AST, pairs: set) -> bool:
    both = isinstance(key, ast.Constant) and isinstance(value, ast.Constant)
    return both and isinstance(value.value, bool) and (key.value, value.value) in pairs


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_call_can_run_what_a_file_says(file: Path) -> None:
    assert not problems(file.read_text(), file.relative_to(PACKAGE).as_posix())


@pytest.mark.parametrize(
    "line",
    [
        "eval(text)",
        "pickle.loads(content)",
        "from pickle import loads",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "yaml.load(text, yaml.Loader)",
        "archive.extractall(directory)",
        "AutoTokenizer.from_pretrained(name, trust_remote_code=True)",
        "subprocess.run(line, shell=True)",
        "np.load(file, allow_pickle=True)",
        "OmegaConf.load(file)",
        "hydra.utils.instantiate(config)",
        'options = {"trust_remote_code": True}',
    ],
)
def test_it_would_be_found(line: str) -> None:
    assert problems(line, "somewhere.py")


@pytest.mark.parametrize("line", ["model.eval()", "torch.load(file, weights_only=True)", "re.compile(pattern)"])
def test_what_is_harmless_is_not(line: str) -> None:
    assert not problems(line, "somewhere.py")
