import json
import logging

import httpx
import openai
import pytest

from herd.cluster.errors import EngineUnavailable
from herd.deployments.protocol import SamplingDefaults

from .fake_gateway import MAX_MODEL_LEN, byte_ids, end, gateway, saying, text_of, tokenizer

POEM = "Füße, 漢字 and 👩‍👩‍👧: END of it"


async def test_chat_whole_and_streamed_say_the_same():
    async with gateway(saying(POEM, cached=4)) as g:
        whole = await g.chat(seed=1)
        streamed = await g.chat(seed=1, stream=True, stream_options={"include_usage": True})
    body, events = whole.json(), streamed.events()
    assert whole.status == streamed.status == 200
    assert body["choices"][0]["message"] == {"role": "assistant", "content": POEM, "refusal": None}
    assert body["choices"][0]["finish_reason"] == "stop"
    assert text_of(events) == POEM
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"] == []
    assert events[-2]["usage"] == body["usage"]
    assert body["usage"]["completion_tokens"] == len(byte_ids(POEM))
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
    assert all(chunk["usage"] is None for chunk in events[:-2])


async def test_a_stream_has_one_id_one_role_chunk_and_one_finish():
    async with gateway(saying(POEM)) as g:
        reply = await g.chat(stream=True)
    events = reply.events()[:-1]
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert len({(e["id"], e["created"], e["model"], e["object"]) for e in events}) == 1
    assert [e["choices"][0]["delta"].get("role") for e in events] == ["assistant"] + [None] * (len(events) - 1)
    assert [e["choices"][0]["finish_reason"] for e in events] == [None] * (len(events) - 1) + ["stop"]
    assert all("usage" not in e for e in events)
    assert events[0]["id"] == "chatcmpl-" + reply.headers["x-request-id"]


async def test_stop_strings_never_leak_and_count_up_to_the_completing_token():
    async with gateway(saying(POEM)) as g:
        whole = (await g.chat(stop=["END"])).json()
        events = (await g.chat(stop="END", stream=True, stream_options={"include_usage": True})).events()
        kept = (await g.chat(stop="END", include_stop_str_in_output=True)).json()
        assert len(g.engines.aborted) == 3, "the engine is told to stop"
    before = POEM[: POEM.index("END")]
    assert whole["choices"][0]["message"]["content"] == text_of(events) == before
    assert kept["choices"][0]["message"]["content"] == before + "END"
    assert whole["usage"]["completion_tokens"] == events[-2]["usage"]["completion_tokens"] == len(byte_ids(before)) + 3
    assert whole["choices"][0]["finish_reason"] == "stop"


async def test_n_choices_are_interleaved_and_seeded_apart():
    async with gateway(saying("abc")) as g:
        events = (await g.chat(n=3, seed=7, stream=True)).events()
        seeds = [r["sampling"]["seed"] for r in g.engines.requests]
        again = (await g.chat(n=3, seed=7)).json()
        assert [r["sampling"]["seed"] for r in g.engines.requests][3:] == seeds
    assert [text_of(events, i) for i in range(3)] == ["abc"] * 3
    order = [e["choices"][0]["index"] for e in events[:-1]]
    assert order.index(2) < len(order) - 1 - order[::-1].index(0), "not one after the other"
    assert seeds[0] == 7
    assert len(set(seeds)) == 3
    assert [c["index"] for c in again["choices"]] == [0, 1, 2]
    assert again["usage"]["completion_tokens"] == 9
    assert again["usage"]["prompt_tokens"] == len(g.engines.requests[0]["prompt_ids"])


async def test_without_a_seed_every_request_draws_another():
    async with gateway() as g:
        for _ in range(5):
            await g.chat()
        assert len({r["sampling"]["seed"] for r in g.engines.requests}) == 5


@pytest.mark.parametrize("shape", ["text", "texts", "ids", "lists of ids"])
async def test_prompts_of_all_four_shapes(shape):
    ids, bos = tokenizer().encode("hello"), tokenizer().bos_id
    prompt, expected, texts = {
        "text": ("hello", [[bos, *ids]], ["hello"]),
        "texts": (["hello", "a"], [[bos, *ids], [bos, *tokenizer().encode("a")]], ["hello", "a"]),
        "ids": (ids, [ids], ["hello"]),
        "lists of ids": ([ids, ids[:1]], [ids, ids[:1]], ["hello", tokenizer().decode(ids[:1])]),
    }[shape]
    async with gateway(saying("xy")) as g:
        whole = await g.complete(prompt, n=2, echo=True)
        assert [r["prompt_ids"] for r in g.engines.requests] == [p for p in expected for _ in range(2)]
        streamed = await g.complete(prompt, n=2, echo=True, stream=True)
    said = [t + "xy" for t in texts for _ in range(2)]
    assert [c["text"] for c in whole.json()["choices"]] == said
    assert [text_of(streamed.events(), i) for i in range(len(said))] == said


async def test_completions_generate_16_tokens_by_default_and_chats_the_rest_of_the_context():
    async with gateway(saying("x" * 600)) as g:
        short = (await g.complete("hi")).json()
        long = (await g.chat()).json()
    assert (short["usage"]["completion_tokens"], short["choices"][0]["finish_reason"]) == (16, "length")
    assert long["usage"]["total_tokens"] == MAX_MODEL_LEN


async def test_sampling_reaches_the_engine():
    async with gateway(defaults=SamplingDefaults(temperature=0.2, top_p=0.9)) as g:
        await g.chat(
            top_p=0.5, top_k=3, min_p=0.1, presence_penalty=1, frequency_penalty=-1, repetition_penalty=1.5,
            logit_bias={"5": -3}, seed=-9, stop_token_ids=[4], ignore_eos=True, max_tokens=9, min_tokens=2,
            logprobs=True, top_logprobs=2, priority=-1, cache_salt="s",
        )  # fmt: skip
        (request,) = g.engines.requests
    assert request["sampling"] == {
        "max_tokens": 9, "min_tokens": 2, "temperature": 0.2, "top_p": 0.5, "top_k": 3, "min_p": 0.1,
        "presence_penalty": 1.0, "frequency_penalty": -1.0, "repetition_penalty": 1.5, "logit_bias": ((5, -3.0),),
        "seed": -9, "stop_token_ids": (4,), "ignore_eos": True, "logprobs": 2,
    }  # fmt: skip
    assert (request["priority"], request["cache_salt"], request["num_resumed_tokens"]) == (-1, "s", 0)
    assert 0 < request["timeout_s"] <= 600


async def test_logprobs_of_both_kinds_cover_every_token():
    async with gateway(saying("aé")) as g:
        chat = (await g.chat(logprobs=True, top_logprobs=1)).json()
        streamed = (await g.chat(logprobs=True, top_logprobs=1, stream=True)).events()
        text = (await g.complete(logprobs=1)).json()
    content = chat["choices"][0]["logprobs"]["content"]
    assert bytes(b for entry in content for b in entry["bytes"]).decode() == "aé"
    parts = [c["logprobs"]["content"] for e in streamed[:-1] for c in e["choices"] if c["logprobs"]]
    assert [entry for part in parts for entry in part] == content
    assert text["choices"][0]["logprobs"]["text_offset"] == [0, 1, 1]
    assert chat["usage"]["completion_tokens"] == len(content) == 3


async def test_continuous_usage_counts_up():
    async with gateway(saying("abcd")) as g:
        options = {"include_usage": True, "continuous_usage_stats": True}
        events = (await g.complete(stream=True, stream_options=options)).events()
    counts = [e["usage"]["completion_tokens"] for e in events[:-1]]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (1, 4)


async def test_token_ids_are_returned_on_demand():
    async with gateway(saying("ab")) as g:
        whole = (await g.complete([1, 2], return_token_ids=True)).json()["choices"][0]
        events = (await g.chat(return_token_ids=True, stream=True)).events()
    assert (whole["token_ids"], whole["prompt_token_ids"]) == (byte_ids("ab"), [1, 2])
    ids = [i for e in events[:-1] for c in e["choices"] for i in c.get("token_ids", [])]
    assert ids == byte_ids("ab")


async def test_request_ids_come_back_and_unknown_fields_are_listed():
    async with gateway() as g:
        reply = await g.chat(mystery=1, headers_={"a": 1}, **{"new\nline": 1})  # pyright: ignore
        assert reply.headers["x-herd-ignored"] == "mystery, headers_, new?line"
        body = {"prompt": "hi"}
        reply = await g.post("/v1/completions", body, headers={"X-Request-Id": "abc-1"})
        assert (reply.headers["x-request-id"], reply.json()["id"]) == ("abc-1", "cmpl-abc-1")
        reply = await g.post("/v1/completions", body | {"request_id": "mine"}, headers={"X-Request-Id": "abc-1"})
        assert (reply.headers["x-request-id"], reply.json()["id"]) == ("mine", "cmpl-mine")
        bad = await g.post("/v1/completions", body, headers={"X-Request-Id": "a b"})
        assert (bad.status, bad.error["param"]) == (400, "x-request-id")
        assert len({r["id"] for r in g.engines.requests}) == len(g.engines.requests)


async def test_models_probes_and_version():
    async with gateway() as g:
        models = (await g.call("GET", "/v1/models")).json()
        assert [m["id"] for m in models["data"]] == ["tiny", "alias"]
        assert models["data"][0]["max_model_len"] == MAX_MODEL_LEN
        assert (await g.call("GET", "/v1/models/alias")).json() == models["data"][1]
        missing = await g.call("GET", "/v1/models/none/such")
        assert (missing.status, missing.error["code"]) == (404, "model_not_found")
        assert (await g.call("HEAD", "/health")).status == 200
        assert (await g.call("GET", "/version")).json()["version"]


async def test_tokenize_and_detokenize():
    async with gateway() as g:
        reply = (await g.post("/tokenize", {"prompt": "hi <|eot|>"})).json()
        assert reply["count"] == len(reply["tokens"])
        assert reply["tokens"] == [tokenizer().bos_id, *tokenizer().encode("hi <|eot|>")]
        assert reply["max_model_len"] == MAX_MODEL_LEN
        back = (await g.post("/detokenize", {"tokens": reply["tokens"]})).json()
        assert back == {"prompt": "<|begin_of_text|>hi <|eot|>"}
        bare = (
            await g.post("/tokenize", {"prompt": "hi", "add_special_tokens": False, "return_token_strs": True})
        ).json()
        assert "".join(bare["token_strs"]) == "hi"
        messages = [{"role": "user", "content": "hi"}]
        await g.chat("hi")
        chat = (await g.post("/tokenize", {"messages": messages})).json()
        assert chat["tokens"] == g.engines.requests[0]["prompt_ids"]
        for body, param in (({}, "prompt"), ({"prompt": 5}, "prompt"), ({"messages": []}, "messages")):
            bad = await g.post("/tokenize", body)
            assert (bad.status, bad.error["param"]) == (400, param)
        for tokens in ([-1], [10**6], "x", None):
            bad = await g.post("/detokenize", {"tokens": tokens})
            assert (bad.status, bad.error["param"]) == (400, "tokens")


async def test_one_line_per_request_without_a_word_of_it(caplog):
    caplog.set_level(logging.INFO, "herd.access")
    async with gateway(saying("secret answer")) as g:
        reply = await g.chat("secret question")
        await g.chat(temperature=9)
        await g.call("GET", "/health")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert reply.headers["x-request-id"] in lines[0]
    assert "/v1/chat/completions 200 " in lines[0]
    assert "output=13" in lines[0]
    assert "finish=stop" in lines[0]
    assert "finish=invalid_value" in lines[1]
    assert "secret" not in caplog.text
    caplog.clear()
    async with gateway(log_requests=False) as g:
        await g.chat()
    assert not caplog.records


async def test_the_openapi_document_describes_the_bodies():
    async with gateway() as g:
        document = (await g.call("GET", "/openapi.json")).json()
        assert (await g.call("GET", "/openapi.json")).json() == document
    schemas = document["components"]["schemas"]
    refs = {r for r in json.dumps(document).split('"') if r.startswith("#/components/schemas/")}
    assert {ref.rsplit("/", 1)[1] for ref in refs} <= schemas.keys()
    assert "422" not in document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert schemas["ChatBody"]["properties"]["temperature"]["anyOf"][0]["maximum"] == 2


async def test_metrics_count_what_happened():
    async with gateway(saying("abc")) as g:
        await g.chat()
        await g.chat(temperature=9)
        g.service.metrics.engines.update("e1", {"running": 3, "name": "x"})
        text = (await g.call("GET", "/metrics")).body.decode()
    assert 'herd_gateway_requests_total{endpoint="/v1/chat/completions",status="200"} 1.0' in text
    assert 'herd_gateway_errors_total{code="invalid_value"} 1.0' in text
    assert "herd_gateway_output_tokens_total 3.0" in text
    assert "herd_gateway_first_token_seconds_count 1.0" in text
    assert 'herd_engine_running{engine="e1"} 3.0' in text


async def test_the_openai_client_understands_us():
    async with gateway(saying(POEM, per_update=3)) as g:
        transport = httpx.ASGITransport(app=g.app)  # pyright: ignore[reportArgumentType]
        http = httpx.AsyncClient(transport=transport)
        client = openai.AsyncOpenAI(base_url="http://herd/v1", api_key="-", http_client=http, max_retries=0)  # pyright: ignore
        messages = [{"role": "user", "content": "hi"}]
        chat = await client.chat.completions.create(model="tiny", messages=messages, n=2, logprobs=True, top_logprobs=2)  # pyright: ignore
        assert [c.message.content for c in chat.choices] == [POEM, POEM]
        assert chat.choices[0].logprobs is not None
        stream = await client.chat.completions.create(
            model="tiny", messages=messages, stream=True, stream_options={"include_usage": True}  # pyright: ignore
        )  # fmt: skip
        chunks = [chunk async for chunk in stream]
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == POEM
        assert chunks[-1].usage is not None
        text = await client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=200)
        assert [c.text for c in text.choices] == [POEM, POEM]
        assert [m.id async for m in client.models.list()] == ["tiny", "alias"]
        assert (await client.models.retrieve("tiny")).id == "tiny"
        with pytest.raises(openai.BadRequestError) as bad:
            await client.chat.completions.create(model="tiny", messages=messages, temperature=7)  # pyright: ignore
        assert bad.value.param == "temperature"
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="no", messages=messages)  # pyright: ignore
        g.engines.script = lambda _: [(byte_ids("a"), None, None), EngineUnavailable("gone")]
        stream = await client.chat.completions.create(model="tiny", messages=messages, stream=True)  # pyright: ignore
        with pytest.raises(openai.APIError, match="gone"):
            [chunk async for chunk in stream]
        await http.aclose()


async def test_an_end_that_comes_alone_still_finishes():
    async with gateway(lambda _: [(byte_ids("ab"), None, None), ((), None, end("length", 2, 1))]) as g:
        body = (await g.complete()).json()
        events = (await g.complete(stream=True)).events()
    assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == ("ab", "length")
    assert text_of(events) == "ab"
    assert events[-2]["choices"][0]["finish_reason"] == "length"
