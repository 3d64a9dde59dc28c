"""The documents' tables: made of the committed results, and what stands there now."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from thoraxrt.benchmarks import readme
from thoraxrt.benchmarks.readme import filled
from thoraxrt.engine.errors import RequestError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


TEXTS = [document.read_text() for document in readme.DOCUMENTS]


def test_the_documents_say_what_the_committed_results_say() -> None:
    assert [filled(text, RESULTS) for text in TEXTS] == TEXTS


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.name)
def test_every_committed_result_makes_a_table(file: Path) -> None:
    names = re.findall(rf"<!-- table (\S+) {file.name} -->", "".join(TEXTS))
    assert names, "a document shows it"
    for name in names:
        first, second, *rows = filled(f"<!-- table {name} {file.name} -->\n<!-- /table -->", RESULTS).splitlines()[1:-1]
        columns = first.count("|")
        assert second == "|" + "---|" * (columns - 1)
        assert rows
        assert {row.count("|") - row.count(r"\|") for row in rows} == {columns}


def test_tables_are_filled_and_the_rest_stays(tmp_path: Path) -> None:
    row = {
        "backend": "a",
        "precision": "fp|32",
        "predict_ms": 26.49,
        "decoding_alone_ms": 5.12,
        "network_alone_ms": 17.7,
    }
    (tmp_path / "x.json").write_bytes(msgspec.json.encode({"results": [row | {"network_busy": 0.842}]}))
    marker = "before\n<!-- table overlap x.json -->\n{}<!-- /table -->\nafter\n"
    once = filled(marker.format("old\n"), tmp_path)
    assert once == marker.format(
        "| backend | precision | predict | decoding alone | network alone | network busy |\n"
        "|---|---|---|---|---|---|\n"
        "| a | fp\\|32 | 26.5 | 5.1 | 17.7 | 84 % |\n"
    )
    assert filled(once, tmp_path) == once


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- table nothing x.json -->\n<!-- /table -->", "no table is called 'nothing'"),
        ("<!-- table overlap y.json -->\n<!-- /table -->", "y.json makes no table 'overlap' .FileNotFoundError"),
        ("<!-- table overlap x.json -->\n<!-- /table -->", "x.json makes no table 'overlap' .KeyError"),
        ("<!-- table parity x.json -->\n<!-- /table -->", "x.json makes no table 'parity' .ValidationError"),
        ("<!-- table overlap x.json -->\n", "marker has no end"),
    ],
)
def test_what_cannot_be_filled_is_an_error(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(RequestError, match=said):
        filled(text, tmp_path)


def test_the_check_fails_where_a_table_is_old_and_the_command_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = next(RESULTS.glob("overlap-*.json"))
    (tmp_path / "README.md").write_text(f"<!-- table overlap {file.name} -->\n<!-- /table -->\n")
    monkeypatch.setattr(readme, "_REPOSITORY", tmp_path)
    monkeypatch.setattr(readme, "DOCUMENTS", (tmp_path / "README.md",))
    with pytest.raises(SystemExit) as ended:
        readme.main(check=True)
    assert ended.value.code == 1
    assert "python -m thoraxrt.benchmarks.readme" in capsys.readouterr().err
    readme.main(check=False)
    readme.main(check=True)
    assert "| openvino |" in (tmp_path / "README.md").read_text()
