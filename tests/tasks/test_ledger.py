"""Why a step ran: traced to settings, files and versions, never to what another step made."""

from pathlib import Path

import pytest
from prefect import flow
from pydantic import BaseModel, ConfigDict

from tasks.caching import step, use_store
from tasks.ledger import Ledger, Reuse, StepCall, explain, keep_ledger, last_ledger, reuse_lines
from tasks.store import ArtifactRef, ArtifactStore, SourceFile, source_file

A, B, C, D = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)


def call(step: str, key: str, *, reused: bool = False, outputs: tuple[str, ...] = (), **inputs: object) -> StepCall:
    return StepCall(step=step, key=key, reused=reused, inputs=inputs, outputs=outputs)


class TestExplain:
    def test_a_first_run_has_nothing_to_be_held_against(self):
        reuse = explain(Ledger(calls=[call("read", "1"), call("read", "2", reused=True)]), None)
        assert (reuse.compared, reuse.ran, reuse.reused) == (False, {"read": 1}, {"read": 1})
        assert reuse_lines(reuse) == [
            "1 steps reused, 1 ran", "ran: read", "reused: read", "no earlier run of this name to compare with"
        ]  # fmt: skip

    def test_other_content_is_named_once_where_it_comes_in_and_not_where_it_goes_on(self):
        before = Ledger(
            calls=[call("read", "1", outputs=(C,), file={"digest": A}), call("fit", "2", ratings={"digest": C})]
        )
        now = Ledger(
            calls=[call("read", "3", outputs=(D,), file={"digest": B}), call("fit", "4", ratings={"digest": D})]
        )
        reuse = explain(now, before)
        assert reuse.content == (f"read: file.digest {A[:12]} → {B[:12]}",)
        assert (reuse.settings, reuse.versions, reuse.lost, reuse.new) == ((), (), (), ())

    def test_settings_are_compared_leaf_by_leaf(self):
        before = Ledger(settings={"arena": {"date": "2024-12-30", "category": "overall"}, "seeds": [1, 2]})
        now = Ledger(settings={"arena": {"date": "2025-02-28", "category": "overall"}, "seeds": [1]})
        assert explain(now, before).settings == ("arena.date 2024-12-30 → 2025-02-28", "seeds.1 2 → null")

    def test_versions_losses_and_new_steps_are_told_apart(self):
        before = Ledger(calls=[call("fit", "fit-v1", x=1), call("read", "r", x=1), call("read", "s", x=2)])
        now = Ledger(
            calls=[
                call("fit", "fit-v2", x=1),
                call("read", "r", x=1),
                call("read", "s", reused=True, x=2),
                call("judge", "j"),
            ]
        )
        reuse = explain(now, before)
        assert (reuse.versions, reuse.lost, reuse.new) == (("fit",), ("read",), ("judge",))

    def test_a_call_is_held_against_the_one_most_like_it(self):
        before = Ledger(
            calls=[call("score", "1", model={"digest": A}, part=1), call("score", "2", model={"digest": B}, part=2)]
        )
        now = Ledger(calls=[call("score", "3", model={"digest": C}, part=2)])
        assert explain(now, before).content == (f"score: model.digest {B[:12]} → {C[:12]}",)

    def test_long_lists_of_reasons_are_cut(self):
        reuse = Reuse(reused={}, ran={"x": 1}, compared=True, settings=tuple(f"s{n} 0 → 1" for n in range(9)))
        assert reuse_lines(reuse)[-1].endswith("s5 0 → 1; and 3 more")


class Text(BaseModel):
    model_config = ConfigDict(frozen=True)

    ref: ArtifactRef


@step(version=1)
def upper(store: ArtifactStore, file: SourceFile) -> Text:
    return Text(ref=store.write_bytes(file.read_bytes().upper(), "text", ".txt"))


@step(version=1)
def twice(store: ArtifactStore, text: ArtifactRef) -> Text:
    return Text(ref=store.write_bytes(2 * store.read_bytes(text), "text", ".txt"))


@pytest.mark.usefixtures("prefect_session")
class TestRuns:
    def run(self, store: ArtifactStore, path: Path, *, fail: bool = False) -> Reuse:
        @flow
        def small() -> Reuse:
            last = last_ledger(store, "small")
            with use_store(store), keep_ledger(store, "small", {"path": "x"}) as ledger:
                twice(upper(source_file(str(path))).ref)
                if fail:
                    raise RuntimeError("stopped")
                return explain(ledger, last)

        return small()

    def test_what_a_second_run_does_is_traced_to_the_file_that_changed(self, tmp_path: Path):
        store = ArtifactStore(url=str(tmp_path / "store"), work_folder=str(tmp_path / "work"))
        path = tmp_path / "in.txt"
        path.write_text("one")
        assert self.run(store, path).compared is False
        same = self.run(store, path)
        assert (same.reused, same.ran, same.content) == ({"upper": 1, "twice": 1}, {}, ())
        path.write_text("two")
        changed = self.run(store, path)
        assert changed.ran == {"upper": 1, "twice": 1}
        assert len(changed.content) == 1
        assert changed.content[0].startswith("upper: file.digest ")
        path.write_text("ONE")  # other bytes, the same result: what follows is reused
        assert self.run(store, path).ran == {"upper": 1}

    def test_a_run_that_failed_is_not_what_the_next_one_is_held_against(self, tmp_path: Path):
        store = ArtifactStore(url=str(tmp_path / "store"), work_folder=str(tmp_path / "work"))
        path = tmp_path / "in.txt"
        path.write_text("one")
        with pytest.raises(RuntimeError, match="stopped"):
            self.run(store, path, fail=True)
        assert last_ledger(store, "small") is None

    def test_a_damaged_note_is_no_note(self, tmp_path: Path):
        store = ArtifactStore(url=str(tmp_path / "store"), work_folder=str(tmp_path / "work"))
        with keep_ledger(store, "x", {}):
            pass
        assert last_ledger(store, "x") == Ledger()
        note = next((tmp_path / "store" / "notes").iterdir())
        note.write_bytes(note.read_bytes() + b"!")
        assert last_ledger(store, "x") is None
