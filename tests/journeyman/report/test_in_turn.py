"""Several students on the page: who answered how much of the test rows, counted row by row."""

import numpy as np

from journeyman import summary
from journeyman.report import page
from journeyman.report.measure import measure
from journeyman.report.verdict import verdict
from tests.journeyman.certify.test_several import COSTS, certified, some_rows
from tests.journeyman.certify.test_step import LABELS
from tests.journeyman.report.synthetic import report_data


def test_the_page_and_the_closing_table_say_who_answered_and_what_it_cost(tmp_path):
    rows, students = some_rows(1.2, 2.2)
    bundle = certified(tmp_path, rows, students, COSTS)
    test = summary._test_rows(rows.split("test"), tmp_path / "bundle", bundle)
    assert bundle.stages is not None and test.stage is not None
    answered, differs, paid = [0, 0, 0], [0, 0, 0], 0.0
    for i, row in enumerate(np.flatnonzero(rows.splits == "test")):
        place, said = 2, int(students[1][row].argmax())
        for stage, logits in enumerate(students):
            paid += (1, 5)[stage]
            confidence = bundle.chain.confidences[stage].of(logits[row][None])[1][0]
            if confidence > 0:
                place, said = stage, int(logits[row].argmax())
                break
        paid += 100 * (place == 2)
        answered[place] += 1
        differs[place] += place < 2 and said != rows.logprobs[row].argmax()
        assert test.accepted[i] == (place < 2) and test.student_answer[i] == said
    lines = {line.name: line for line in summary._stages(test, bundle)}
    for place in (0, 1):
        line = lines[f"student {place + 1}"]
        assert line.value == f"{answered[place] / 60:.1%} ({answered[place]} of 60)"
        assert line.note == f"{differs[place]} of these otherwise than the teacher"
    assert lines["teacher"].value.startswith(f"{answered[2] / 60:.1%}")
    assert lines["cost of a request"].value == f"{paid / 60:.3g}"
    assert sum(differs) == measure(test).n_accepted_differs

    html, _ = page.render(report_data(labels=LABELS, bundle=bundle, test=test))
    assert "1: before-0" in html and "2: own" in html and "3: the teacher" in html
    assert f"{paid / 60:.3g} on 60 test rows, in the recipe&#39;s unit" in html
    words = " ".join(verdict(measure(test), bundle).sentences)
    assert "There are 2 students, asked in turn, and one promise over them all." in words
    assert any(f"student {place}, confidence" in html for place in (1, 2))


def test_one_student_has_no_table_of_several():
    data = report_data()
    assert summary._stages(data.test, data.bundle) == []
    assert "asked in turn" not in page.render(data)[0]
