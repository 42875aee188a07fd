"""Links in the place of outputs, and names that want to be markup."""

import json

import numpy as np
import pytest
from hostile import RECORDS

from cellseg.coco import write_records
from cellseg.data.audit import Audit, Oddity
from cellseg.data.sizes import CellSizes
from cellseg.ensemble import ensemble_files
from cellseg.evaluation import ClassCurve, Scores, curves_table
from cellseg.files import write_atomically
from cellseg.markdown import escape


def test_a_link_in_place_of_an_output_is_replaced_and_not_followed(tmp_path):
    outside = tmp_path / "outside.json"
    outside.write_text("mine", encoding="utf-8")
    (tmp_path / "runs").mkdir()
    link = tmp_path / "runs" / "result.json"
    try:
        link.symlink_to(outside)
    except OSError:
        pytest.skip("this system makes no links")
    write_atomically(link, "new")
    assert outside.read_text(encoding="utf-8") == "mine"
    assert not link.is_symlink() and link.read_text(encoding="utf-8") == "new"
    write_records(link, RECORDS)
    assert outside.read_text(encoding="utf-8") == "mine"


HOSTILE = ["a|b", "`x`", "<script>alert(1)</script>", "[x](javascript:alert(1))", "a\nb", "$x$"]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_escaped_in_what_is_rendered(name, tmp_path):
    write_records(tmp_path / "good.json", RECORDS)
    bad = tmp_path / f"{name.replace('/', '')}.json"
    bad.write_text(json.dumps([RECORDS[0] | {"image_id": name}]), encoding="utf-8")
    none = CellSizes(np.zeros((0, 4)), *np.zeros((3, 0)))
    audit = Audit(("a",), [], none, "true", (), [Oddity(name, name, "overlap", name)])
    curve = ClassCurve(1, 0, 0, 0, None, *np.zeros((3, 0)), best=None)
    scores = Scores(*[None] * 6, {name: None}).table(), curves_table({name: curve})
    for text in (ensemble_files(tmp_path).summary(), audit.table(), *scores):
        for piece in ("a|b", "`x`", "<script", "](java", "a\nb", "$x$"):
            assert piece not in text
    assert escape("TCGA-5P_x (2).tif [1, 2]") == "TCGA-5P_x (2).tif [1, 2]"
