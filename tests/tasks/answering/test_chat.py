"""What is sent for a prompt, and what is read out of what comes back."""

import threading
import time
from typing import Any

import pytest

from charm_core.sampling import Answer, Decoding
from tasks.answering.chat import Prompt, ask_chat, failed_answer, read_answer, request_body
from tasks.answering.endpoints import Failure, MalformedAnswerError
from tasks.answering.pacing import Pacing
from tasks.policy_models import OpenAIBackend
from tests.endpoint_server import Asked, EndpointServer, Reply, completion, failure

QUICK = Pacing(first_wait_seconds=0.01, longest_wait_seconds=0.05)


def prompt(text: str = "hello", prompt_id: str = "p1", **roles: str) -> Prompt:
    return Prompt(prompt_id=prompt_id, messages=[{"role": "user", "content": text}])


def backend(url: str = "http://127.0.0.1:1/v1", **options: Any) -> OpenAIBackend:
    return OpenAIBackend(base_url=url, model="tiny", **options)


def read(body: Any) -> Answer:
    return read_answer("p1", body)


class TestRequests:
    def test_the_whole_decoding_is_sent(self):
        decoding = Decoding(
            sampling_temperature=0.5, top_p=0.9, max_tokens=7, seed=3, system_prompt="Be brief.", stop=("END", "\n\n")
        )
        body = request_body(backend(), decoding, prompt())
        seed = body.pop("seed")
        assert body == {
            "model": "tiny",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}],
            "temperature": 0.5,
            "top_p": 0.9,
            "max_tokens": 7,
            "stop": ["END", "\n\n"],
        }
        assert 0 <= seed < 2**31

    def test_every_prompt_has_its_own_seed_whatever_is_asked_with_it(self):
        seeds = [request_body(backend(), Decoding(seed=0), prompt(prompt_id=f"p{n}"))["seed"] for n in range(100)]
        assert len(set(seeds)) == 100
        assert seeds[5] == request_body(backend(), Decoding(seed=0), prompt("other text", "p5"))["seed"]
        assert seeds[5] != request_body(backend(), Decoding(seed=1), prompt(prompt_id="p5"))["seed"]

    def test_what_is_not_set_is_not_sent(self):
        body = request_body(backend(), Decoding(seed=None), prompt())
        assert {"seed", "stop"} & body.keys() == set()

    def test_what_the_server_refuses_is_not_sent(self):
        special = backend(
            token_limit="max_completion_tokens",
            leave_out=("temperature", "top_p", "seed"),
            extra_body={"chat_template_kwargs": {"enable_thinking": False}},
        )
        assert request_body(special, Decoding(max_tokens=9), prompt()) == {
            "model": "tiny",
            "messages": [{"role": "user", "content": "hello"}],
            "max_completion_tokens": 9,
            "chat_template_kwargs": {"enable_thinking": False},
        }
        assert special.identity() != backend().identity()

    def test_a_prompts_own_system_message_stays(self):
        own = Prompt(
            prompt_id="p", messages=[{"role": "system", "content": "own"}, {"role": "user", "content": "hello"}]
        )
        sent = request_body(backend(), Decoding(system_prompt="ours"), own)["messages"]
        assert [message["content"] for message in sent] == ["own", "hello"]


class TestAnswers:
    def test_a_good_one(self):
        assert read(completion("It is 42.", model="tiny-2026-01-01")) == Answer(
            prompt_id="p1",
            response="It is 42.",
            status="complete",
            finish_reason="stop",
            prompt_tokens=5,
            response_tokens=3,
            served_as="tiny-2026-01-01",
        )

    @pytest.mark.parametrize(
        ("body", "response", "status"),
        [
            (completion("half of", finish_reason="length"), "half of", "truncated"),
            (completion("", finish_reason="stop"), "", "empty"),
            (completion(" \n"), " \n", "empty"),
            (completion(None, finish_reason="length"), "", "empty"),
            (completion("bad", finish_reason="content_filter"), "bad", "refused"),
            (completion(None, refusal="I will not."), "I will not.", "refused"),
            (
                completion("I'm sorry, but I can't assist with that."),
                "I'm sorry, but I can't assist with that.",
                "refused",
            ),
            (completion("half a \ud83d pair"), "half a ? pair", "complete"),
        ],
    )
    def test_how_it_ended(self, body: Any, response: str, status: str):
        answer = read(body)
        assert (answer.response, answer.status) == (response, status)

    @pytest.mark.parametrize(
        "usage", [None, {}, {"prompt_tokens": None}, {"prompt_tokens": "5"}, {"prompt_tokens": -1}, [], True]
    )
    def test_tokens_are_counted_where_the_server_does(self, usage: Any):
        answer = read(completion("x") | {"usage": usage})
        assert (answer.prompt_tokens, answer.response_tokens) == (None, None)

    @pytest.mark.parametrize(
        "body",
        [
            None,
            "",
            "<html>",
            [],
            {},
            {"choices": None},
            {"choices": []},
            {"choices": [None]},
            {"choices": [{}]},
            {"choices": [{"message": None}]},
            {"choices": [{"message": "text"}]},
            {"choices": [{"message": {"content": 5}}]},
            {"choices": [{"message": {"content": ["parts"]}}]},
            {"choices": [{"message": {"content": "x"}, "finish_reason": 1}]},
            {"error": {"message": "in a body with status 200"}},
        ],
    )
    def test_what_is_no_completion(self, body: Any):
        with pytest.raises(MalformedAnswerError):
            read(body)

    def test_an_error_in_a_good_answer_is_said(self):
        with pytest.raises(MalformedAnswerError, match="provider down"):
            read({"error": {"message": "provider down", "code": 502}})

    def test_failures_are_rows_and_a_content_filter_is_an_answer(self):
        failed = failed_answer("p1", Failure(status=400, code="context_length_exceeded", message="too long"))
        assert (failed.status, failed.response, failed.reason) == ("failed", "", "400: too long")
        filtered = failed_answer("p1", Failure(status=400, code="content_filter", message="The response was filtered"))
        assert (filtered.status, filtered.finish_reason) == ("refused", "content_filter")


class TestAsking:
    def ask(self, server: EndpointServer, count: int, **options: Any) -> list[Answer]:
        answers: list[Answer] = []
        asked = (prompt(f"question {n}", f"p{n}") for n in range(count))
        with_url = backend(server.url, **options)
        ask_chat(with_url, Decoding(), asked, answers.append, threading.Event(), pacing=QUICK)
        return answers

    def test_every_prompt_has_one_answer_and_its_own(self):
        with EndpointServer() as server:
            answers = self.ask(server, 50, concurrency=8)
        assert {answer.prompt_id: answer.response for answer in answers} == {
            f"p{n}": f"answer to question {n}" for n in range(50)
        }
        assert len(answers) == 50

    def test_malformed_answers_are_asked_for_again_and_then_given_up(self):
        broken = Reply({"choices": [{"message": {"content": 5}}]})

        def behaviour(asked: Asked) -> Reply | None:
            if asked.prompt == "question 1":
                return broken
            return broken if asked.time == 0 and asked.body else None

        with EndpointServer(behaviour) as server:
            answers = {answer.prompt_id: answer for answer in self.ask(server, 4, max_tries=3)}
        assert answers["p1"].status == "failed"
        assert answers["p1"].reason == "no status: the answer is malformed: its content or its finish_reason is no text"
        assert [answers[f"p{n}"].status for n in (0, 2, 3)] == ["complete"] * 3
        assert server.times() == {"question 0": 2, "question 1": 3, "question 2": 2, "question 3": 2}

    def test_a_content_filter_is_not_asked_again(self):
        filtered = failure(400, "The prompt was filtered", code="content_filter")
        with EndpointServer(lambda asked: filtered if asked.prompt == "question 1" else None) as server:
            answers = {answer.prompt_id: answer.status for answer in self.ask(server, 3)}
        assert answers == {"p0": "complete", "p1": "refused", "p2": "complete"}
        assert server.times()["question 1"] == 1

    def test_it_can_be_stopped_from_another_thread(self):
        stop, answers = threading.Event(), []

        def on_answer(answer: Answer) -> None:
            answers.append(answer)
            if len(answers) == 5:
                stop.set()

        prompts = (prompt(f"question {n}", f"p{n}") for n in range(10_000))
        with EndpointServer(latency=0.01) as server:
            ask_chat(backend(server.url, concurrency=2), Decoding(), prompts, on_answer, stop, pacing=QUICK)
            time.sleep(0.2)  # what was on its way when it stopped still arrives
            count = len(server.asked)
            time.sleep(0.2)
            assert len(server.asked) == count < 100
