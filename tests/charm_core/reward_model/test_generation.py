"""Answers of a tiny policy model: exact where that can be said, and the same whatever is answered with them."""

import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from charm_core.errors import ConfigError, ModelError
from charm_core.reward_model import vllm_generation
from charm_core.reward_model.generation import draw_tokens, generate_answers
from charm_core.reward_model.generation_job import PolicyModelSpec
from charm_core.sampling import Answer, Decoding, request_seed
from charm_core.tables import PROMPTS
from tests.tiny_policy_model import WORDS, save_policy_model

COLUMNS = {name: kind for name, kind in PROMPTS.columns.items() if name != "prompt_set"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy_model(tmp_path_factory.mktemp("policy") / "model")


def prompts_of(*texts: str) -> pl.DataFrame:
    rows = [{"prompt_id": f"p{n}", "messages": [{"role": "user", "content": text}]} for n, text in enumerate(texts)]
    return pl.DataFrame(rows, schema=COLUMNS)


MANY = prompts_of(*(" ".join(WORDS[n : n + 1 + n % 7]) for n in range(24)))


def answers(folder: Path, prompts: pl.DataFrame, batch_size: int = 4, **decoding: Any) -> dict[str, Answer]:
    spec = PolicyModelSpec(path=str(folder), batch_size=batch_size, dtype="float32")
    batches = list(generate_answers(spec, Decoding(**{"max_tokens": 12, **decoding}), prompts))
    found = [answer for batch in batches for answer in batch]
    assert len({answer.prompt_id for answer in found}) == len(found)
    return {answer.prompt_id: answer for answer in found}


class TestDrawing:
    LOGITS = torch.log(torch.tensor([[0.5, 0.2, 0.05, 0.25]]))

    def drawn(self, count: int = 20_000, **options: float) -> list[float]:
        uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        tokens = draw_tokens(self.LOGITS.expand(count, -1), uniforms, **{"temperature": 1.0, "top_p": 1.0, **options})
        counts = Counter(tokens.tolist())
        return [counts[token] / count for token in range(4)]

    def test_tokens_come_with_their_probabilities(self):
        assert self.drawn() == pytest.approx([0.5, 0.2, 0.05, 0.25], abs=1e-3)

    def test_temperature_sharpens(self):
        squares = [p * p for p in (0.5, 0.2, 0.05, 0.25)]
        assert self.drawn(temperature=0.5) == pytest.approx([square / sum(squares) for square in squares], abs=1e-3)

    def test_the_nucleus_is_what_reaches_the_share(self):
        assert self.drawn(top_p=0.7) == pytest.approx([2 / 3, 0, 0, 1 / 3], abs=1e-3)
        assert self.drawn(top_p=0.76) == pytest.approx([0.5 / 0.95, 0.2 / 0.95, 0, 0.25 / 0.95], abs=1e-3)
        assert self.drawn(top_p=0.01) == [1.0, 0.0, 0.0, 0.0]

    @pytest.mark.parametrize("uniform", [0.0, 1.0 - 2**-53])
    @pytest.mark.parametrize("top_p", [1.0, 0.9])
    def test_the_ends_of_the_interval_draw_possible_tokens(self, uniform: float, top_p: float):
        logits = torch.tensor([[-torch.inf, 0.0, 0.1, -torch.inf], [0.1] * 4])
        drawn = draw_tokens(logits, torch.full((2,), uniform, dtype=torch.float64), 1.0, top_p)
        assert drawn[0] in (1, 2)
        assert drawn[1] in (0, 1, 2, 3)


class TestAnswers:
    def test_greedy_is_the_argmax_of_a_plain_forward_pass(self, folder: Path):
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
        found = answers(folder, MANY, sampling_temperature=0.0)
        for prompt_id, messages in MANY.iter_rows():
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
            new: list[int] = []
            while len(new) < 12 and tokenizer.eos_token_id not in new:
                with torch.inference_mode():
                    new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
            assert found[prompt_id].response == tokenizer.decode(new, skip_special_tokens=True)
            assert (found[prompt_id].prompt_tokens, found[prompt_id].response_tokens) == (len(ids), len(new))
            assert found[prompt_id].finish_reason == ("stop" if tokenizer.eos_token_id in new else "length")

    def test_the_same_seed_gives_the_same_answers_and_another_others(self, folder: Path):
        assert answers(folder, MANY) == answers(folder, MANY)
        assert answers(folder, MANY) != answers(folder, MANY, seed=1)
        assert answers(folder, MANY, seed=None) != answers(folder, MANY, seed=None)

    def test_an_answer_does_not_depend_on_what_is_answered_with_it(self, folder: Path):
        together = answers(folder, MANY, batch_size=24)
        assert answers(folder, MANY, batch_size=1) == together
        assert answers(folder, MANY.reverse(), batch_size=5) == together
        assert answers(folder, MANY.slice(3, 1)) == {"p3": together["p3"]}

    def test_the_global_generator_plays_no_part(self, folder: Path):
        torch.manual_seed(1)
        first = answers(folder, MANY)
        torch.manual_seed(2)
        assert answers(folder, MANY) == first

    def test_the_limit_of_tokens_is_a_truncation(self, folder: Path):
        found = answers(folder, MANY, max_tokens=3)
        assert {answer.response_tokens for answer in found.values() if answer.status == "truncated"} == {3}
        assert Counter(answer.finish_reason for answer in found.values())["length"] > 0

    def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(self, folder: Path):
        free = answers(folder, MANY, max_tokens=30)
        stopped = answers(folder, MANY, max_tokens=30, stop=("w7 ",))
        cut = {prompt_id for prompt_id, answer in free.items() if "w7 " in answer.response}
        assert 0 < len(cut) < 24
        for prompt_id, answer in stopped.items():
            assert answer.response == free[prompt_id].response.split("w7 ")[0]
            assert prompt_id not in cut or answer.finish_reason == "stop"
            assert answer.response_tokens <= free[prompt_id].response_tokens

    def test_a_system_prompt_changes_the_answers(self, folder: Path):
        plain, prompted = answers(folder, MANY), answers(folder, MANY, system_prompt="w1 w2")
        assert prompted["p0"].prompt_tokens == plain["p0"].prompt_tokens + 4
        assert prompted != plain

    def test_a_prompt_that_leaves_little_room_gets_that_and_one_that_leaves_none_fails(self, tmp_path: Path):
        small = save_policy_model(tmp_path / "small", max_length=16)
        found = answers(
            small, prompts_of("w1", " ".join(WORDS[:9]), " ".join(WORDS[:12]), " ".join(WORDS)), max_tokens=30
        )
        assert [found[f"p{n}"].prompt_tokens for n in range(4)] == [4, 12, 15, 43]
        assert [(found[f"p{n}"].response_tokens or 0) <= room for n, room in enumerate((12, 4, 1))] == [True] * 3
        assert found["p3"].status == "failed"
        assert found["p3"].reason == "the prompt has 43 tokens, and the model takes 16 with the response"

    def test_settings_of_the_model_itself_do_not_come_in(self, folder: Path, tmp_path: Path):
        import json
        import shutil

        other = tmp_path / "other"
        shutil.copytree(folder, other)
        config = other / "generation_config.json"
        settings = json.loads(config.read_text()) | {
            "top_k": 1,
            "repetition_penalty": 5.0,
            "do_sample": True,
            "max_length": 5,
        }
        config.write_text(json.dumps(settings))
        assert answers(other, MANY) == answers(folder, MANY)

    def test_first_prompts_are_answered_first(self, folder: Path):
        spec = PolicyModelSpec(path=str(folder), batch_size=1)
        many = prompts_of(*(["w1"] * 40))
        order = [answer.prompt_id for batch in generate_answers(spec, Decoding(max_tokens=1), many) for answer in batch]
        assert {int(prompt_id[1:]) for prompt_id in order[:8]} == set(range(8))

    def test_a_conversation_that_the_template_refuses_fails_alone(self, tmp_path: Path):
        refusing = "{% if messages[0]['content'] == 'w3' %}{{ raise_exception('no w3') }}{% endif %}w1"
        folder = save_policy_model(tmp_path / "refusing", chat_template=refusing)
        found = answers(folder, prompts_of("w1", "w3"), max_tokens=2)
        assert found["p0"].status != "failed"
        assert found["p1"].status == "failed"
        assert "no w3" in (found["p1"].reason or "")

    def test_the_day_plays_no_part(self, tmp_path: Path):
        dated = "{{ strftime_now('%Y') }} {% for m in messages %}{{ m['content'] }} {% endfor %}<assistant>"
        folder = save_policy_model(tmp_path / "dated", chat_template=dated)
        assert answers(folder, prompts_of("w1"))["p0"].prompt_tokens == 3


class TestModels:
    def test_no_folder_and_no_weights(self, folder: Path, tmp_path: Path):
        with pytest.raises(ModelError, match="cannot be loaded"):
            answers(tmp_path / "absent", MANY)

    def test_pickled_weights_are_not_read(self, folder: Path, tmp_path: Path):
        import shutil

        other = tmp_path / "pickled"
        shutil.copytree(folder, other)
        weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        torch.save(weights, other / "pytorch_model.bin")
        (other / "model.safetensors").unlink()
        with pytest.raises(ModelError, match="cannot be loaded"):
            answers(other, MANY)

    def test_without_a_chat_template_nobody_is_asked(self, folder: Path, tmp_path: Path):
        import shutil

        other = tmp_path / "base"
        shutil.copytree(folder, other)
        (other / "chat_template.jinja").unlink()
        with pytest.raises(ModelError, match="has no chat template"):
            answers(other, MANY)


class FakeVllm(types.ModuleType):
    """Stands in for vLLM, which runs on GPUs only: it keeps what it is given and answers with its number."""

    def __init__(self) -> None:
        super().__init__("vllm")
        self.made: dict[str, Any] = {}
        self.chats: list[tuple[Any, list[dict[str, Any]]]] = []

    def LLM(self, **options: Any) -> Any:
        self.made = options
        return types.SimpleNamespace(chat=self.chat)

    @staticmethod
    def SamplingParams(**options: Any) -> dict[str, Any]:
        return options

    def chat(self, conversations: Any, sampling_params: list[dict[str, Any]], use_tqdm: bool) -> list[Any]:
        assert not use_tqdm
        self.chats += zip(conversations, sampling_params, strict=True)
        return [
            types.SimpleNamespace(
                outputs=[types.SimpleNamespace(text=f"number {n}", finish_reason="length", token_ids=[1, 2, 3])],
                prompt_token_ids=[0] * 5,
            )
            for n in range(len(conversations))
        ]


class TestVllm:
    SPEC = PolicyModelSpec(engine="vllm", path="org/model", revision="a" * 40, tensor_parallel=2, max_model_length=4096)

    def test_what_it_is_given_and_what_is_read_out_of_it(self, monkeypatch: pytest.MonkeyPatch):
        fake = FakeVllm()
        monkeypatch.setitem(sys.modules, "vllm", fake)
        decoding = Decoding(
            sampling_temperature=0.5, top_p=0.9, max_tokens=7, seed=3, stop=("END",), system_prompt="Hi"
        )
        (found,) = vllm_generation.generate_answers(self.SPEC, decoding, prompts_of("one", "two"))
        assert fake.made == {
            "model": "org/model",
            "revision": "a" * 40,
            "tokenizer_revision": "a" * 40,
            "dtype": "auto",
            "tensor_parallel_size": 2,
            "max_model_len": 4096,
            "trust_remote_code": False,
            "generation_config": "vllm",
        }
        conversation, parameters = fake.chats[1]
        assert [message["role"] for message in conversation] == ["system", "user"]
        assert parameters == {
            "temperature": 0.5, "top_p": 0.9, "max_tokens": 7, "seed": request_seed(3, "p1"), "stop": ["END"],
        }  # fmt: skip
        assert found[1] == Answer(
            prompt_id="p1",
            response="number 1",
            status="truncated",
            finish_reason="length",
            prompt_tokens=5,
            response_tokens=3,
        )

    def test_without_it_the_error_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "vllm", None)
        with pytest.raises(ConfigError, match=r"pip install 'charm-rm\[vllm\]'"):
            list(vllm_generation.generate_answers(self.SPEC, Decoding(), prompts_of("one")))
