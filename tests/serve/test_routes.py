"""The routes beside answers: the tokenizer's, the models', and what watchdogs ask."""

import http.client
import json

import pytest

import theodora
from serving import expected
from theodora.adapters.load import load_adapter
from tiny import tiny_model, tiny_tokenizer

HI = [{"role": "user", "content": "Hi"}]


def ask(server, method, path, body=None, **headers):
    """Status and body of a bare request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    kind = {} if body is None else {"content-type": "application/json"}
    connection.request(method, path, None if body is None else json.dumps(body).encode(), kind | headers)
    reply = connection.getresponse()
    found = reply.status, json.loads(reply.read())
    connection.close()
    return found


def get(server, path):
    return ask(server, "GET", path)[1]


def post(server, path, **body):
    return ask(server, "POST", path, body)


def test_texts_and_chats_as_tokens_and_back(server):
    ids = tiny_tokenizer()("Hé")["input_ids"]
    status, found = post(server, "/tokenize", model="dora4", prompt="Hé", return_token_strs=True)
    assert (status, found["tokens"], found["count"], found["max_model_len"]) == (200, ids, 3, 512)
    assert found["token_strs"] == tiny_tokenizer().convert_ids_to_tokens(ids)
    assert post(server, "/detokenize", tokens=ids)[1] == {"prompt": "Hé"}
    _, chat = post(server, "/tokenize", messages=HI)
    text = post(server, "/detokenize", tokens=chat["tokens"])[1]["prompt"]
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    _, shorter = post(server, "/tokenize", messages=HI, add_generation_prompt=False)
    assert shorter["count"] < chat["count"]
    info = get(server, "/tokenizer_info")
    assert (info["eos_token"], info["chat_template"]) == ("<|im_end|>", tiny_tokenizer().chat_template)


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "no model 'other'"),
        ("/tokenize", {}, 400, "prompt: expected, and not there"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"prompt": "a", "made_up": 1}, 400, "made_up: not supported"),
        ("/tokenize", {"prompt": "\ud83d"}, 400, "half a character"),
        ("/detokenize", {"tokens": [1 << 40]}, 400, "tokens holds ids outside 0 to 271"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens.0"),
    ],
)
def test_what_cannot_be_a_token_says_so(server, path, body, status, says):
    found, reply = post(server, path, **body)
    assert found == status
    assert says in reply["error"]["message"]


def test_a_route_that_is_not_there_is_named(server):
    status, reply = post(server, "/v1/embeddings", input="a")
    assert (status, reply["error"]["message"]) == (404, "There is no POST /v1/embeddings here.")
    status, reply = ask(server, "GET", "/v1/completions")
    assert (status, reply["error"]["message"]) == (405, "There is no GET /v1/completions here.")


def test_what_watchdogs_ask(server_of, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    server = server_of(api_key_file=str(keys))
    assert ask(server, "GET", "/ping") == ask(server, "POST", "/ping") == (200, {"status": "ok"})
    assert ask(server, "GET", "/version")[0] == 401
    told = ask(server, "GET", "/version", authorization="Bearer secret")
    assert told == (200, {"version": theodora.__version__})


def test_models_say_where_they_come_from(server):
    base, dora, _ = get(server, "/v1/models")["data"]
    assert (base["root"], base["parent"], base["max_model_len"]) == ("base", None, 512)
    assert (dora["root"], dora["parent"], dora["max_model_len"]) == ("dora4", "base", 512)
    assert get(server, "/v1/models/dora4") == dora


def test_a_folder_is_not_told_under_another_name(server_of, tmp_path):
    settings = {"max_queue": 1, "served_name": "mine"}
    assert get(server_of(**settings), "/v1/models")["data"][0]["root"] == "base"
    hidden = server_of(**settings, model_name=str(tmp_path))
    assert get(hidden, "/v1/models")["data"][0]["root"] == tmp_path.name


def test_an_adapter_in_the_place_of_another(server_of, adapter_dir):
    folder = adapter_dir("dora4").parent
    server = server_of(adapter_folder=str(folder.parent))

    def load(path, **more):
        name = str(path.relative_to(folder.parent))
        return post(server, "/v1/load_lora_adapter", lora_name="mine", lora_path=name, **more)

    def answer():
        asked = {"model": "mine", "prompt": "Hello", "max_tokens": 8, "temperature": 0}
        return server.client.completions.create(**asked).choices[0].text

    def alone(path, name):
        model = load_adapter(tiny_model(), path, name).eval()
        return tiny_tokenizer().decode(expected(model, tiny_tokenizer()("Hello")["input_ids"], 8)[0])

    first, second = adapter_dir("dora4"), adapter_dir("lora8")
    assert load(first, load_inplace=True)[0] == 200
    assert answer() == alone(first, "dora4")
    status, reply = load(second)
    assert status == 400
    assert "load_inplace" in json.dumps(reply)
    assert load(second, load_inplace=True)[0] == 200
    assert answer() == alone(second, "lora8")
    assert [model.id for model in server.client.models.list()] == ["base", "mine"]
    assert load(first.parent, load_inplace=True)[0] == 400  # no adapter: the one that is served stays
    assert answer() == alone(second, "lora8")
