"""A process that compiles nothing does not import the compiler; one that compiles gets it whole."""

import json
import subprocess
import sys
import textwrap

import pytest
from support import lm_tree, write_recipe


def run(code: str, tmp_path) -> dict:
    """What the code printed as JSON in its last line, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "changes",
    [
        {"loop": {"gradient_checkpointing": True, "steps": 2}},
        {"update": "in_backward", "loop": {"steps": 2}},
        {"update": "streamed", "offload": "ssd"},
    ],
    ids=["plain", "in_backward", "streamed"],
)
def test_a_whole_run_of_the_command_does_not_load_it(changes, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", lm_tree(tmp_path, **changes))
    found = run(
        f"""
        import json, sys
        from mnemic.train.cli import main
        status = main(["train", {str(recipe)!r}])
        print(json.dumps({{
            "status": status, "kind": type(sys.modules["torch._dynamo"]).__name__,
            "compiler": "torch._dynamo.convert_frame" in sys.modules,
        }}))
        """,
        tmp_path,
    )
    assert found == {"status": 0, "kind": "_Unloaded", "compiler": False}


def test_compiling_later_in_the_process_works_and_knows_what_was_marked(tmp_path):
    found = run(
        """
        import json, sys
        from mnemic.train.lazy_dynamo import put_off_dynamo
        put = put_off_dynamo()
        import torch

        @torch._dynamo.assume_constant_result
        def constant():
            return 3

        import transformers.models.llama.modeling_llama
        from accelerate.utils.other import is_compiled_module
        line = torch.nn.Linear(2, 2)
        before = (type(torch._dynamo).__name__, is_compiled_module(line))
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph

        compiled = torch.compile(line, backend=backend)
        x = torch.ones(1, 2)
        same = bool(torch.equal(compiled(x), line(x)))
        print(json.dumps({
            "put": put, "before": before, "after": type(torch._dynamo).__name__, "same": same,
            "graphs": len(graphs), "compiled": is_compiled_module(compiled),
            "plain": is_compiled_module(line),
            "marked": getattr(constant, "_dynamo_marked_constant", False),
            "again": put_off_dynamo(),
        }))
        """,
        tmp_path,
    )
    assert found == {
        "put": True, "before": ["_Unloaded", False], "after": "module", "same": True,
        "graphs": 1, "compiled": True, "plain": False, "marked": True, "again": False,
    }  # fmt: skip


def test_it_is_not_replaced_where_it_is_loaded_already(tmp_path):
    found = run(
        """
        import json
        import torch._dynamo
        from mnemic.train.lazy_dynamo import put_off_dynamo
        before = torch._dynamo
        print(json.dumps([put_off_dynamo(), torch._dynamo is before]))
        """,
        tmp_path,
    )
    assert found == [False, True]


@pytest.mark.parametrize("first", ["put_off_dynamo()", "import torch._dynamo"])
def test_a_process_that_plans_imports_what_the_run_imports(first, tmp_path):
    """Or the imports of the plan would not be those of the run."""
    recipe = write_recipe(tmp_path / "r.yaml", lm_tree(tmp_path))
    code = f"""
        import json
        from mnemic.train.lazy_dynamo import put_off_dynamo
        from mnemic.train.recipe.load import dump_recipe, load_recipe
        from mnemic.train.plan import budget

        def kind(tree, folder):
            import sys, transformers.models.llama.modeling_llama
            return type(sys.modules["torch._dynamo"]).__name__

        budget.chosen = kind
        if __name__ == "__main__":
            {first}
            recipe, _ = load_recipe({str(recipe)!r}, [])
            print(json.dumps({{"kind": budget.apart(dump_recipe(recipe))}}))
        """
    (tmp_path / "script.py").write_text(textwrap.dedent(code))
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    kind = "_Unloaded" if first.startswith("put") else "module"
    assert json.loads(done.stdout.splitlines()[-1]) == {"kind": kind}
