"""The commands data check, preview and split."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from phi3_lora.data.quality.report import KINDS, Lengths, Problem, spread
from phi3_lora_cli.faults import run_reporting_faults
from phi3_lora_cli.main import group
from tests.tiny import TEMPLATE, chat, write_model, write_rows

Capture = pytest.CaptureFixture[str]
LONG = "please tell me in a short sentence where the order of twelve red cups for the shop is"


def run(capsys: Capture, *arguments: str | Path) -> tuple[int, str, str]:
    code = run_reporting_faults(group, ["data", *map(str, arguments)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    return code, captured.out, captured.err


def run_json(capsys: Capture, *arguments: str | Path, expected: int = 0) -> dict[str, Any]:
    code, out, err = run(capsys, *arguments, "--json")
    assert code == expected, err
    assert out.count("\n") == 1
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def problems_of(report: dict[str, Any]) -> list[tuple[int, str]]:
    return [(p["line"], p["kind"]) for p in report["problems"]]


ROWS: list[tuple[Any, list[str]]] = [
    (chat("Two red cups to Oslo.", "Noted."), []),
    (chat("Two  red cups to Oslo. ", "Noted."), ["duplicate", "whitespace"]),
    ("nonsense", ["bad-row"]),
    (chat("x", "  "), ["empty"]),
    (chat("", "Nothing was asked."), ["empty"]),
    (chat("Say <|end|> now", "No."), ["marker-text"]),
    (chat("Where is the caf\u00c3\u00a9?", "Here."), ["encoding"]),
    (chat(LONG, "It is in Bergen."), []),
    (chat(LONG.upper(), "It is, in Bergen!"), ["near-duplicate"]),
    (
        {
            "messages": [
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": "Because.", "weight": 0},
            ]
        },
        [],
    ),
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "d.jsonl", [row for row, _ in ROWS])


def test_check_continues_after_bad_rows_and_names_every_problem(
    capsys: Capture, data: Path, model: Path
) -> None:
    report = run_json(capsys, "check", data, "--model", model, expected=3)
    expected = [(i, kind) for i, (_, kinds) in enumerate(ROWS, start=1) for kind in kinds]
    assert sorted(problems_of(report)) == sorted([*expected, (10, "no-loss")])
    assert {p["file"] for p in report["problems"]} == {str(data)}
    told = {p["line"]: p["message"] for p in report["problems"]}
    assert told[9] == f"1.00 like {data}:8" and "Windows-1252" in told[7]
    assert (
        report["counts"]["bad-row"] == 1
        and report["counts"]["empty"] == 2
        and list(report["counts"]) == [kind for kind in KINDS if kind in report["counts"]]
    )
    assert report["num_rows"] == 8 and report["num_valid_rows"] == 0
    assert report["near_duplicates"] is True


def test_check_is_silent_on_good_data_and_measures_it(
    capsys: Capture, tmp_path: Path, model: Path
) -> None:
    data = write_rows(tmp_path / "d.jsonl", [chat("a", "bc"), chat("d" * 9, "e" * 20)])
    characters = run_json(capsys, "check", data)
    assert characters["problems"] == [] and characters["counts"] == {}
    assert characters["lengths"]["unit"] == "characters"
    assert (characters["lengths"]["min"], characters["lengths"]["max"]) == (3, 29)
    assert characters["num_tokens"] is characters["loss_share"] is None
    tokens = run_json(capsys, "check", data, "--model", model)
    # Five tokens are markers, and one of them is in the loss; each byte is a token.
    assert tokens["lengths"]["unit"] == "tokens"
    assert (tokens["lengths"]["min"], tokens["lengths"]["max"]) == (8, 34)
    assert (tokens["num_tokens"], tokens["loss_tokens"]) == (42, 24)
    assert tokens["loss_share"] == 24 / 42
    assert sum(b["rows"] for b in tokens["lengths"]["histogram"]) == 2
    code, out, err = run(capsys, "check", data, "--model", model)
    assert code == 0 and err == "" and "no problem found" in out
    assert re.search(r"in the loss +24 of 42 tokens \(57\.1%\)", out)
    assert re.search(r"rows +2 to train on, 0 to validate on", out)


def test_check_shows_twenty_problems_of_every_kind_and_counts_all(
    capsys: Capture, tmp_path: Path
) -> None:
    rows = [chat(f" question {i}", f"{i}") for i in range(50)] + ["nonsense"]
    data = write_rows(tmp_path / "d.jsonl", rows)
    code, out, _ = run(capsys, "check", data)
    shown = [line for line in out.splitlines() if line.startswith(f"{data}:")]
    assert code == 3 and len(shown) == 20
    assert "bad-row" in shown[-1] and "whitespace" in shown[0]
    assert "... and 31 more (--json lists all)" in out
    assert re.search(r"whitespace +50\n", out) and re.search(r"bad-row +1\n", out)
    assert len(run_json(capsys, "check", data, expected=3)["problems"]) == 51


def test_check_finds_leaks_into_a_validation_file_and_a_folders_own(
    capsys: Capture, tmp_path: Path
) -> None:
    train = write_rows(tmp_path / "f/train.jsonl", [chat(LONG, "yes"), chat("other", "words")])
    rows = [chat(LONG, "yes"), chat(f"{LONG} now", "yes"), chat("quite", "new")]
    valid = write_rows(tmp_path / "f/valid.jsonl", rows)
    by_option = run_json(capsys, "check", train, "--valid", valid, expected=3)
    by_folder = run_json(capsys, "check", tmp_path / "f", expected=3)
    for report in (by_option, by_folder):
        leaks = [p for p in report["problems"] if p["kind"] == "leak"]
        assert [(p["file"], p["line"]) for p in leaks] == [(str(valid), 1), (str(valid), 2)]
        assert leaks[0]["message"] == f"is in the training data, too: {train}:1"
        assert re.fullmatch(rf"0\.\d\d like the training row {train}:1", leaks[1]["message"])
        assert report["num_valid_rows"] == 3 and report["files"] == [str(train), str(valid)]
    exact = run_json(capsys, "check", tmp_path / "f", "--no-near-duplicates", expected=3)
    assert problems_of(exact) == [(1, "leak")] and exact["near_duplicates"] is False


def test_check_keeps_to_limits_patterns_and_a_language(capsys: Capture, tmp_path: Path) -> None:
    rows = [
        chat("Hi", "Hello, how can I help you today?"),
        chat("Who are you?", "I am an AI model."),
        chat("Quelle est la capitale de la France ?", "C'est Paris, bien entendu."),
        chat("a", "b"),
    ]
    data = write_rows(tmp_path / "d.jsonl", rows)
    limits = ("--min-chars", "3", "--max-chars", "40", "--pattern", "AI model", "--pattern", "^a$")
    report = run_json(capsys, "check", data, *limits, "--language", "en", expected=3)
    assert problems_of(report) == [
        (2, "pattern"),
        (3, "too-long"),
        (3, "language"),
        (4, "too-short"),
        (4, "pattern"),
    ]
    assert run_json(capsys, "check", data)["problems"] == []


def test_check_names_rows_beyond_the_context(capsys: Capture, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", max_position_embeddings=30)
    data = write_rows(tmp_path / "d.jsonl", [chat("a", "b"), chat("a" * 20, "b" * 20)])
    report = run_json(capsys, "check", data, "--model", model, expected=3)
    (problem,) = report["problems"]
    assert (problem["line"], problem["kind"]) == (2, "too-long")
    assert problem["message"] == "45 tokens, more than the model's context of 30"


def test_check_names_rows_that_the_template_refuses(capsys: Capture, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    config = json.loads((model / "tokenizer_config.json").read_text())
    refuse = "{% if 'bad' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}"
    config["chat_template"] = refuse + TEMPLATE
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    rows = [chat("a", "b"), chat("bad", "b"), chat("c", "d"), chat("bad too", "b")]
    data = write_rows(tmp_path / "d.jsonl", rows)
    report = run_json(capsys, "check", data, "--model", model, expected=3)
    assert problems_of(report) == [(2, "bad-row"), (4, "bad-row")]
    message = report["problems"][0]["message"]
    assert message.startswith("the chat template refuses") and "d.jsonl" not in message
    assert report["num_tokens"] == 14


def test_check_names_lines_that_are_not_utf8_and_continues(capsys: Capture, tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    good = json.dumps(chat("a", "b")).encode()
    data.write_bytes(b'{"prompt": "caf\xe9", "completion": "x"}\n' + good + b"\n")
    report = run_json(capsys, "check", data, expected=3)
    assert problems_of(report) == [(1, "encoding")] and report["num_rows"] == 1
    assert "not UTF-8" in report["problems"][0]["message"]


def test_check_output_cannot_drive_the_terminal(capsys: Capture, tmp_path: Path) -> None:
    row = chat("\x1b[31mred\x1b[0m", "\u202eturned")
    data = write_rows(tmp_path / "d.jsonl", [row])
    code, out, _ = run(capsys, "check", data, "--pattern", ".*red.*")
    assert code == 3 and "red" in out
    assert all(c == "\n" or c.isprintable() for c in out)


def test_check_takes_the_settings_of_train(capsys: Capture, tmp_path: Path, model: Path) -> None:
    data = tmp_path / "d.csv"
    data.write_text("question,reply\na,b\nc,d\n")
    columns = "data.columns={prompt: question, completion: reply}"
    report = run_json(capsys, "check", data, "--model", model, "--set", columns)
    assert (report["num_rows"], report["loss_tokens"]) == (2, 4)
    config = tmp_path / "run.yaml"
    settings = {"train": str(data), "loss_on": "all", "columns": {"prompt": "question"}}
    settings["columns"]["completion"] = "reply"
    config.write_text(json.dumps({"model": str(model), "data": settings}))
    every = run_json(capsys, "check", "--config", config)
    assert every["num_tokens"] == 14 and every["loss_tokens"] == 12
    assert run_json(capsys, "preview", "-c", config)["documents"][0]["loss_mask"][1:] == [True] * 6


def test_a_custom_template_is_used(capsys: Capture, tmp_path: Path, model: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    )
    data = write_rows(tmp_path / "d.jsonl", [chat("a", "b")])
    arguments = (data, "--model", model, "--set", f"data.chat_template={template}")
    assert run_json(capsys, "check", *arguments)["num_tokens"] == 6
    assert len(run_json(capsys, "preview", *arguments)["documents"][0]["token_ids"]) == 6


def test_without_datasketch_check_says_so_and_split_stops(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "d.jsonl", [chat(LONG, "a"), chat(LONG + "!", "a")])
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda n, *a: None if n == "datasketch" else find_spec(n, *a)
    )
    monkeypatch.setitem(__import__("sys").modules, "datasketch", None)
    report = run_json(capsys, "check", data)
    assert report["problems"] == [] and report["near_duplicates"] is False
    assert "near duplicates are not looked for: pip install" in run(capsys, "check", data)[2]
    assert run(capsys, "check", data, "--no-near-duplicates")[2] == ""
    for arguments in (("check", data, "--near-duplicates"), ("split", data, "--output", "x")):
        code, out, err = run(capsys, *arguments)
        assert code == 2 and "pip install 'phi3-lora[data]'" in err and out == ""


def test_preview_gives_ids_and_mask_of_the_first_rows(
    capsys: Capture, tmp_path: Path, model: Path
) -> None:
    # Rows after the rows to show are not read.
    data = write_rows(tmp_path / "d.jsonl", [chat("a", "bc"), chat("d", "e"), ["nonsense"]])
    found = run_json(capsys, "preview", data, "--model", model, "--limit", "2")
    assert list(found) == ["documents"] and len(found["documents"]) == 2
    first = found["documents"][0]
    assert first["source"] == f"{data}:1"
    assert first["loss_mask"] == [False] * 4 + [True] * 3 + [False]
    assert len(first["token_ids"]) == 8
    code, out, _ = run(capsys, "preview", data, "--model", model, "--limit", "2")
    assert code == 0 and "<|user|>a<|end|><|assistant|>\u27e6bc<|end|>\u27e7<|endoftext|>" in out
    code, _, err = run(capsys, "preview", data, "--model", model)
    assert code == 2 and f"{data}:3: must be a JSON object, got list" in err and "data check" in err


def test_preview_writes_a_page(capsys: Capture, tmp_path: Path, model: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", [chat("a", "bc")])
    page = tmp_path / "page.html"
    arguments = ("preview", data, "--model", model, "--html", page)
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and out == f"wrote {page}\n"
    assert 'class="t l s"' in page.read_text()
    found = run_json(capsys, *arguments)
    assert found["html"] == str(page) and len(found["documents"]) == 1


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (["check"], "no data: name DATA"),
        (["check", "/nowhere/d.jsonl"], "no such data file"),
        (["check", "demo", "--pattern", "("], "is not a regular expression"),
        (["check", "demo", "--language", "english"], "got 'english'"),
        (["check", "demo", "--min-chars", "5", "--max-chars", "2"], "min_chars 5 is above"),
        (["check", "demo", "--set", "data.colums=1"], "did you mean columns?"),
        (["preview", "demo"], "no model: pass --model"),
        (["preview", "demo", "--model", "/nowhere/m"], "no such model folder"),
        (["split", "demo"], "--output"),
        (["split", "demo", "--output", "x", "--valid-fraction", "1"], "--valid-fraction"),
        (["split", "demo", "--output", "x", "--group-by", "user"], "'user' is missing or null"),
        (["chek"], "chek"),
    ],
)
def test_wrong_usage_exits_2(capsys: Capture, arguments: list[str], phrase: str) -> None:
    code, out, err = run(capsys, *arguments)
    assert code == 2 and phrase in err and out == ""
    assert not Path("x").exists()


def test_check_names_rows_whose_system_message_the_template_leaves_out(
    capsys: Capture, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "m")
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] = TEMPLATE.replace("message['role'] == 'system'", "false")
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    data = write_rows(tmp_path / "d.jsonl", [chat("a", "b"), chat("c", "d") | {"system": "Be."}])
    report = run_json(capsys, "check", data, "--model", model, expected=3)
    assert problems_of(report) == [(2, "system-lost")]
    assert report["counts"] == {"system-lost": 1}


def test_check_measures_nothing_where_no_row_can_be_read(capsys: Capture, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", ["nonsense"])
    code, out, _ = run(capsys, "check", data)
    assert code == 3 and "a row" not in out and "0 to train on" in out


def test_at_least_95_percent_of_rows_are_within_the_reported_length() -> None:
    import numpy as np

    found = Lengths("tokens", np.array([10] * 8 + [3000], dtype=np.int64)).to_dict()
    assert (found["median"], found["p95"], found["max"]) == (10, 3000, 3000)


def test_problems_are_spread_over_kinds_in_their_order() -> None:
    problems = [Problem("f", i, "ab"[i >= 8], "m") for i in range(10)]
    assert [p.line for p in spread(problems, 4)] == [0, 1, 8, 9]
    assert spread(problems, 20) == problems


@pytest.mark.parametrize(
    ("values", "bins"),
    [
        ([], []),
        ([7], [(7, 7, 1)]),
        ([36, 41, 48], [(36, 37, 1), (38, 39, 0), (40, 41, 1), (42, 43, 0), (44, 45, 0),
                        (46, 47, 0), (48, 49, 1)]),
        ([1, 2, 3, 9], [(1, 1, 1), (2, 3, 2), (4, 7, 0), (8, 15, 1)]),
        ([0, 8], [(0, 0, 1), (1, 1, 0), (2, 3, 0), (4, 7, 0), (8, 15, 1)]),
    ],
)  # fmt: skip
def test_a_histogram_holds_every_row_in_few_round_bins(
    values: list[int], bins: list[tuple[int, int, int]]
) -> None:
    import numpy as np

    lengths = Lengths("tokens", np.array(values, dtype=np.int64))
    assert lengths.histogram() == bins
    assert lengths.to_dict()["max"] == max(values, default=0)


def test_a_histogram_of_any_lengths_has_each_row_in_its_bin() -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    for _ in range(200):
        values = rng.integers(rng.integers(1, 500), rng.integers(501, 4000), 50)
        bins = Lengths("tokens", values).histogram()
        assert len(bins) <= 13 and bins[0][2] and bins[-1][2]
        for least, greatest, rows in bins:
            assert rows == ((values >= least) & (values <= greatest)).sum()
        assert sum(rows for _, _, rows in bins) == 50
