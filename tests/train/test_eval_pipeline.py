"""`mnemic eval memory` of an adapter bank: tables and JSON on a small LoCoMo file, what it goes on
from, and what it refuses.
"""

import json
import shutil
from argparse import Namespace

import pytest
from bank_support import EXTRACT, GENERATE, UPDATE, bank_of
from support import lm_tree, write_recipe

from mnemic.models.memory.op_prompts import OPERATIONS, generate_messages
from mnemic.models.memory.op_writer import ModelWriter
from mnemic.models.tiny import byte_tokenizer, tiny_llama
from mnemic.train.cli import parser
from mnemic.train.errors import RecipeError, UserError
from mnemic.train.eval_bank import SHARED, find, find_shared, is_bank, load, need
from mnemic.train.eval_memory import eval_memory
from mnemic.train.eval_pipeline import plan_of
from mnemic.train.recipe.load import build_recipe, dump_recipe

SHORT: dict[str, int] = dict.fromkeys(OPERATIONS, 8)
MODEL = {"kind": "tiny", "hidden_size": 32, "layers": 1, "heads": 2, "max_position": 1024}


def tiny_bank(*operations):
    tokenizer = byte_tokenizer(1024)
    return bank_of(
        *operations,
        model=tiny_llama(
            tokenizer, hidden_size=32, layers=1, heads=2, max_position=1024, seed=0
        ),
    )  # fmt: skip


def save(bank, folder, *operations, named=True):
    bank.save(folder, operations)
    if named:
        (folder / "bank.json").write_text(json.dumps({"model": MODEL, "operations": operations}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """bank/, its operations one by one in parts/, a plain adapter in shared/, and locomo.json."""
    root = tmp_path_factory.mktemp("pipeline")
    bank = tiny_bank(*OPERATIONS)
    save(bank, root / "bank", *OPERATIONS)
    for operation in OPERATIONS:
        save(bank, root / "parts" / operation, operation)
    save(tiny_bank("mem_all"), root / "one", "mem_all", named=False)
    shutil.copytree(root / "one" / "mem_all", root / "shared")
    (root / "shared" / "card.json").unlink()
    (root / "locomo.json").write_text(json.dumps([_conversation(n) for n in range(3)]))
    return root


def _conversation(number):
    def said(session, n, text):
        return {"speaker": f"Ann{number}", "dia_id": f"D{session}:{n}", "text": text}

    return {
        "sample_id": f"conv-{number}",
        "conversation": {
            "session_1": [said(1, 1, f"I moved to Oslo {number}."), said(1, 2, "I sing.")],
            "session_1_date_time": "1:00 pm on 7 May, 2023",
            "session_2": [said(2, 1, "My cat is ill.")],
            "session_2_date_time": "1:00 pm on 9 May, 2023",
        },
        "observation": {
            "session_1_observation": {f"Ann{number}": [["Ann moved to Oslo", "D1:1"]]},
        },
        "qa": [
            {"question": "Where does Ann live?", "answer": "Oslo", "evidence": ["D1:1"],
             "category": 4},
            {"question": "When did Ann sing?", "answer": "7 May 2023", "evidence": ["D1:2"],
             "category": 2},
            {"question": "What is Bob's job?", "adversarial_answer": "cook", "evidence": [],
             "category": 5},
        ],
    }  # fmt: skip


def arguments(folder, *more, target="bank") -> Namespace:
    where = ["--suite", "locomo", "--path", str(folder / "locomo.json")]
    short = ["--max-new-tokens", "12,8,8"]
    return parser().parse_args(["eval", "memory", str(folder / target), *where, *short, *more])


def test_all_systems_side_by_side_and_again_from_the_file(folder, capsys, caplog):
    out = folder / "out.json"
    systems = f"base,experts,shared={folder / 'shared'},full,rag"
    given = ("--conversations", "0,2", "--systems", systems, "--json", str(out))
    assert eval_memory(arguments(folder, *given)) == 0
    shown = capsys.readouterr().out
    titles = "answers", "score by type", "extraction", "update", "operations", "experts minus"
    assert [title for title in titles if title not in shown] == []
    assert "2 streams of 4 chunks, 6 questions" in shown and "single_hop" in shown
    assert "experts mem_extract" in shown and "rag: answered by mem_generate" in shown
    found = json.loads(out.read_text())
    assert set(found) == {"rows", "ratios", "env", "samples"}
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["experts", "base", "shared", "full", "rag"]
    assert rows["experts"]["extract"]["recall"] == 0 == rows["experts"]["extract"]["json_valid"]
    assert rows["base"]["experts_minus"]["score"]["mean"] <= 1
    sizes = [own["adapter_bytes"] for own in rows["experts"]["operations"].values()]
    assert min(sizes) > 0 and rows["base"]["operations"][EXTRACT]["adapter_bytes"] == 0
    assert "extract" not in rows["full"] and set(rows["full"]["operations"]) == {GENERATE}
    turns = found["samples"]["experts"]["turns"]
    assert turns[0][0]["date"] == "1:00 pm on 7 May, 2023" and len(turns[1]) == 2
    # Each system is another model: no two wrote the same.
    texts = {name: str(found["samples"][name]["turns"]) for name in ("experts", "base", "shared")}
    assert len(set(texts.values())) == 3

    # Again: everything is taken from the file, but what the settings changed.
    before = out.read_text()
    caplog.clear()
    caplog.set_level("INFO", "mnemic")
    assert eval_memory(arguments(folder, *given, "--resume")) == 0
    assert caplog.text.count("kept from") == 5 and "update" not in caplog.text
    assert json.loads(out.read_text()) == json.loads(before)
    caplog.clear()
    given = (*given[:3], "base", *given[4:], "--k", "3", "--resume")
    assert eval_memory(arguments(folder, *given)) == 0
    assert "kept from" not in caplog.text and "was made otherwise" in capsys.readouterr().out


def test_folders_of_single_operations_are_one_bank_with_the_same_texts(folder):
    parts = [str(folder / "parts" / operation) for operation in OPERATIONS]
    assert is_bank(",".join(parts)) and is_bank(parts[0]) and is_bank(str(folder / "bank"))
    source = find(",".join(parts))
    need(source)
    joined = load(source, find_shared(str(folder / "one"), source))
    assert set(joined.bank.operations) == {*OPERATIONS, SHARED}
    assert set(joined.bytes({UPDATE: UPDATE, EXTRACT: None})) == {UPDATE}
    asked = [generate_messages(["Ann sings"], "Who sings?")]
    texts = [
        [writer.write(op, asked)[0].text for op in OPERATIONS]
        for target in (joined, load(find(str(folder / "bank"))))
        for writer in [ModelWriter(target.bank, target.tokenizer, max_new_tokens=SHORT)]
    ]
    assert texts[0] == texts[1] and len(set(texts[0])) == 3
    with pytest.raises(RecipeError, match="has no mem_update, mem_generate, it has mem_extract"):
        need(find(parts[0]))
    # Without experts among the systems it does.
    base = arguments(
        folder, "--systems", "base", "--questions", "1", target=f"parts/{EXTRACT}"
    )  # fmt: skip
    assert eval_memory(base) == 0


def test_a_run_of_a_bank_is_its_result_over_its_own_base(fork_server, folder, tmp_path):
    recipe = {
        "name": "bank", "model": MODEL, "adapters": {"kind": "bank", "r": 4},
        "data": {"kind": "operations", "size": 4}, "loop": {"steps": 1, "seed": 3},
        "objective": {"kind": "sft", "max_length": 1024},
        "optimizer": {"kind": "adamw", "lr": 1e-3},
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    status, text = fork_server.run("train", "r.yaml", cwd=tmp_path)
    assert status == 0, text
    run = tmp_path / "runs" / "bank"
    for target in (run, run / "final"):
        assert is_bank(str(target))
        # Other weights than the seed's would be refused by the cards.
        assert set(load(find(str(target))).bank.operations) == set(OPERATIONS)
    status, text = fork_server.run(
        "eval", "memory", str(run), "--episodes", "2", "--max-new-tokens", "8,8,8", cwd=tmp_path
    )
    assert status == 0 and "2 streams of 12 chunks" in text and "operation" in text, text
    status, text = fork_server.run(
        "eval", "memory", str(run), "--systems", "shared=nothing", cwd=tmp_path
    )
    assert status == 1 and "shared=nothing: needs the folder of one PEFT adapter" in text
    recipe["adapters"]["kind"] = "lora"
    (run / "recipe.yaml").write_text(json.dumps({**recipe, "data": {"kind": "facts"}}))
    assert not is_bank(str(run))


def test_a_shared_run_is_of_the_base_in_whatever_type_it_was_held(folder, tmp_path):
    tree = lm_tree(tmp_path, model={"kind": "smollm2-135m", "dtype": "fp32"}, adapters="lora")
    run = tmp_path / "run"
    (run / "final").mkdir(parents=True)
    write_recipe(run / "recipe.yaml", dump_recipe(build_recipe(tree)))
    (run / "final" / "adapter_config.json").write_text("{}")
    source = find(str(folder / "bank"), "smollm2-135m")
    assert source.model["dtype"] == "bf16"
    assert find_shared(str(run), source) == run / "final"
    with pytest.raises(UserError, match="trained over smollm2-135m and the target over some/model"):
        find_shared(str(run), find(str(folder / "bank"), "some/model"))


def test_what_cannot_be_a_bank_is_refused(folder, tmp_path):
    target = str(folder / "bank")
    with pytest.raises(UserError, match="holds no adapter bank"):
        find(f"{target},{tmp_path}")
    with pytest.raises(UserError, match=r"mem_extract is in .*bank too"):
        find(f"{target},{folder / 'parts' / EXTRACT}")
    unnamed = save(tiny_bank(EXTRACT), tmp_path / "unnamed", EXTRACT, named=False)
    with pytest.raises(UserError, match="add --base MODEL"):
        find(str(unnamed))
    given = find(str(unnamed), "some/model").model
    assert (given["kind"], given["path"]) == ("pretrained", "some/model")
    (unnamed / "bank.json").write_text("{")
    with pytest.raises(UserError, match="the section of a recipe"):
        find(str(unnamed))
    (unnamed / "bank.json").write_text(json.dumps({"model": {**MODEL, "layers": 2}}))
    with pytest.raises(UserError, match="share a base"):
        find(f"{unnamed},{folder / 'parts' / UPDATE}")
    with pytest.raises(UserError, match=r"unnamed/mem_extract: was trained over the base"):
        load(find(str(unnamed)))
    with pytest.raises(UserError, match="one PEFT adapter"):
        find_shared(target, find(target))
    assert not is_bank(str(tmp_path)) and not is_bank(str(folder / "shared"))
    assert not is_bank("memory_sft_tiny")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--systems", "expert"), r"--systems: 'expert' is not one of .*did you mean 'experts'"),
        (("--systems", "shared"), "only shared has a folder: shared=FOLDER"),
        (("--systems", "base=x"), "only shared has a folder"),
        (("--systems", ","), "names none of"),
        (("--k", "0"), "--k: must be 1 or more"),
        (("--max-new-tokens", "3,4"), "needs EXTRACT,UPDATE,GENERATE"),
        (("--resume",), "goes on from --json"),
        (("--judge", "http://x"), "go together"),
        (("--answerer", "rule"), "--answerer: has no effect on an adapter bank"),
        (("--lengths", "2"), "--lengths: has no effect on an adapter bank"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(folder, more, message):
    with pytest.raises(RecipeError, match=message):
        plan_of(arguments(folder, *more))


def test_options_of_a_bank_are_refused_elsewhere_and_a_foreign_file_is_no_report(folder, tmp_path):
    args = parser().parse_args(["eval", "memory", "memory_sft_tiny", "--systems", "base"])
    with pytest.raises(RecipeError, match="--systems: is for an adapter bank"):
        eval_memory(args)
    file = tmp_path / "old.json"
    file.write_text("[]")
    with pytest.raises(UserError, match="is no report of an adapter bank"):
        eval_memory(arguments(folder, "--json", str(file), "--resume"))


def test_generated_streams_are_natural_and_few_by_default():
    args = parser().parse_args(["eval", "memory", "x"])
    plan, notes = plan_of(args)
    assert plan.request.episodes == 16 and plan.request.seeds == [1000] and not notes
    assert list(plan.systems) == ["experts", "base"] and plan.settings == {"k": 5, "answer_k": 10}
