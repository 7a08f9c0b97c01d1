"""Tests a node with OpenAI's own Python client: `python openai_client.py http://127.0.0.1:PORT/v1 MODEL`."""

import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1], api_key="not asked for", max_retries=0, timeout=120)
MODEL = sys.argv[2]
ASK = [{"role": "user", "content": "Name a colour."}]


def chat(**arguments):
    return client.chat.completions.create(**{"model": MODEL, "messages": ASK, "temperature": 0, "max_tokens": 12} | arguments)


def refused(kind, code, **arguments):
    try:
        chat(**arguments)
    except kind as error:
        assert error.code == code, (error.code, code)
        print(f"{kind.__name__:16} {error.status_code} {error.code}: {error.body['message'][:90]}")
        return error
    raise AssertionError(f"{arguments} was accepted")


assert MODEL in [model.id for model in client.models.list()]
assert client.models.retrieve(MODEL).id == MODEL

whole = chat()
message = whole.choices[0].message
assert message.role == "assistant" and message.content and whole.model == MODEL
assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
assert whole.usage.completion_tokens <= 12 and whole.choices[0].finish_reason in ("stop", "length")
print("whole:   ", repr(message.content), whole.usage.total_tokens, "tokens")

chunks = list(chat(stream=True, stream_options={"include_usage": True}))
assert chunks[0].choices[0].delta.role == "assistant"
streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
assert streamed == message.content, (streamed, message.content)
assert chunks[-1].usage.total_tokens == whole.usage.total_tokens and not chunks[-1].choices
assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
assert len({c.id for c in chunks}) == 1
print("streamed:", len(chunks), "chunks, the same text")

logged = chat(logprobs=True, top_logprobs=3, max_tokens=4).choices[0].logprobs.content
assert len(logged) == 4 and all(len(entry.top_logprobs) == 3 for entry in logged)
assert all(entry.logprob == entry.top_logprobs[0].logprob <= 0 for entry in logged)
assert bytes(b for entry in logged for b in entry.bytes).decode() == "".join(entry.token for entry in logged)
print("logprobs:", [(entry.token, round(entry.logprob, 3)) for entry in logged])

first_word = message.content.split()[0]
stopped = chat(stop=[message.content[len(first_word) : len(first_word) + 3]])
assert stopped.choices[0].message.content == first_word and stopped.choices[0].finish_reason == "stop"
print("stopped: ", repr(stopped.choices[0].message.content))

several = chat(n=3, temperature=1.2, seed=7, max_completion_tokens=8)
texts = [choice.message.content for choice in several.choices]
assert [choice.index for choice in several.choices] == [0, 1, 2] and len(set(texts)) > 1
assert texts == [c.message.content for c in chat(n=3, temperature=1.2, seed=7, max_completion_tokens=8).choices]
assert texts[1] == chat(temperature=1.2, seed=8, max_completion_tokens=8).choices[0].message.content
assert several.usage.prompt_tokens == whole.usage.prompt_tokens
print("three:   ", texts)

parts = chat(messages=[{"role": "user", "content": [{"type": "text", "text": "Name a "}, {"type": "text", "text": "colour."}]}])
assert parts.choices[0].message.content == message.content
biased = chat(logit_bias={"5": -100}, top_p=0.9, presence_penalty=0.5, frequency_penalty=0.5)
assert biased.choices[0].message.content

plain = client.completions.create(model=MODEL, prompt="The sky is", max_tokens=5, temperature=0, logprobs=2)
assert len(plain.choices[0].logprobs.tokens) == 5 and plain.choices[0].text == "".join(plain.choices[0].logprobs.tokens)
pair = client.completions.create(model=MODEL, prompt=["The sky is", "The sea is"], max_tokens=5, temperature=0, n=2)
assert [choice.index for choice in pair.choices] == [0, 1, 2, 3] and pair.choices[0].text == plain.choices[0].text
lines = client.completions.create(model=MODEL, prompt="The sky is", max_tokens=5, temperature=0, stream=True)
assert "".join(chunk.choices[0].text for chunk in lines) == plain.choices[0].text
print("plain:   ", repr(plain.choices[0].text), repr(pair.choices[2].text))

refused(openai.NotFoundError, "model_not_found", model="no-such-model")
refused(openai.BadRequestError, "context_length_exceeded", messages=[{"role": "user", "content": "word " * 9000}])
assert refused(openai.BadRequestError, "invalid_value", temperature=-1).param == "temperature"
assert refused(openai.BadRequestError, "invalid_value", n=99).param == "n"
assert refused(openai.BadRequestError, "invalid_value", top_logprobs=5).param == "top_logprobs"
assert refused(openai.BadRequestError, "invalid_value", messages=[{"role": "nobody", "content": "x"}]).param == "messages[0].role"
print("all answers are as the client expects")
