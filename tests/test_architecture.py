import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FLOORS = [
    "",
    "sharding",
    "ops",
    "moe",
    "models",
    "checkpoints",
    "engine",
    "planning",
    "measuring",
    "serving",
    "front doors",
]
GROUND = {"jaxmoe.errors", "jaxmoe.axes", "jaxmoe.spans"}
HOST_SIDE = {
    f"jaxmoe.engine.{name}"
    for name in ("config", "request", "block_pool", "kv_events", "pages", "sequence", "scheduler")
}
SEEN_BY_SERVING = {f"jaxmoe.engine{name}" for name in ("", ".config", ".request", ".kv_events", ".engine")}
FAMILIES = ("mixtral", "deepseek_v3", "llama4")


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(ROOT.glob("jaxmoe/**/*.py"))}


def floor(module):
    """0 is the ground; a module may import from its own floor and from those below."""
    if module in GROUND:
        return 0
    area = module.split(".")[1] if module.count(".") else ""
    return FLOORS.index(area) if area in FLOORS[1:-1] else FLOORS.index("front doors")


def imports(module):
    """Every module that the source names in an import, wherever in the file; submodules by their own name."""
    path = SOURCES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            origin = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                name = f"{origin}.{alias.name}"
                yield name if name in SOURCES else origin


def own(names):
    return {name for name in names if name.split(".")[0] == "jaxmoe"}


@pytest.mark.parametrize("module", SOURCES)
def test_each_floor_imports_only_floors_below_it(module):
    above = {name for name in own(imports(module)) if floor(name) > floor(module)}
    assert not above, f"{module} may not import {sorted(above)}"


@pytest.mark.parametrize("module", [module for module in SOURCES if floor(module) == FLOORS.index("serving")])
def test_serving_knows_of_the_engine_only_its_plain_data_and_its_door(module):
    inside = {name for name in own(imports(module)) if name.startswith("jaxmoe.engine")} - SEEN_BY_SERVING
    assert not inside, f"{module} may not import {sorted(inside)}"


@pytest.mark.parametrize("module", sorted(HOST_SIDE))
def test_the_host_side_of_the_engine_imports_neither_jax_nor_numpy(module):
    names = set(imports(module))
    assert not {name for name in names if name.split(".")[0] in ("jax", "jaxlib", "numpy")}
    assert own(names) <= HOST_SIDE | GROUND


def test_the_scheduler_runs_in_a_process_that_never_loads_jax_or_numpy():
    program = "import sys, jaxmoe.engine.scheduler; print(*{'jax', 'numpy'} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_read_in_one_sitting(family):
    path = ROOT / "jaxmoe" / "models" / f"{family}.py"
    if path.exists():
        assert len(path.read_text().splitlines()) <= 300
