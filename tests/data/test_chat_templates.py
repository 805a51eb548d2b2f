"""Families of chat templates × shapes of turns: what is learned, beside two judges that know nothing of it.

The judges are TRL's own training templates, whose `{% generation %}` markers say what a model writes, and rendering up
to each turn, with the generation prompt and without: where the whole conversation begins with both, the turn stands
between them. Where they differ from what is learned, `VERDICTS` says so with a letter, and the letter's check (in
`_of_trl` and `_of_prefixes`) is why the mask is right all the same:

    =  both judges agree, or the one that can speak
    h  TRL's markers take in the header (or an opened <think>) that the generation prompt gives: no model writes it
    e  the judges have an empty turn learned, of which the template shows nothing: it is left out, and said
    m  TRL's markers leave out the token that ends the call
    n  the template writes no token behind a turn: the next role's ends it (GLM's own end tokens)
    p  after a tool's result the generation prompt lacks the header that the template writes; a header is not learned
    w  prefixes say nothing: the template writes turns otherwise once others follow, or otherwise than it prompts
    l  something is left out by the template, and said
    x  the template refuses the conversation
"""

import re

import pytest
import trl
from packaging.version import Version

from chat_shapes import SHAPES, TRL_TEMPLATES, tokenizer_for, tools_for
from theodora.data.chat import ChatRenderer
from theodora.data.hidden import Hidden
from theodora.data.templates import TEMPLATE_ERRORS
from tiny import tiny_tokenizer

COLUMNS = list(SHAPES)
# text system reasoning thought call last-call calls text+call reasoning+call all
VERDICTS = {
    "cohere": "= = l = x el x x x x",
    "cohere2": "= = l = x el x x x x",
    "cohere2_training": "= = l = x el x x x x",
    "cohere_training": "= = l = x el x x x x",
    "deepseek_r1_distill": "w w lw lw lw lw lw lw lw lw",
    "deepseek_r1_distill_training": "hw hw hlw h ehlw elw ehlw hlw ehlw hlw",
    "deepseekv3": "w w lw lw lw lw lw lw lw lw",
    "deepseekv3_training": "hw hw hlw hlw hlw hlw hlw hlw hlw hlw",
    "diffusion_gemma": "= = lw lw p = p w lw lw",
    "diffusion_gemma_training": "= = lw lw mp m mp mw lmw lmw",
    "gemma": "= = l = x el x x x x",
    "gemma3": "= = l = x el x x x x",
    "gemma3_training": "= = l = x el x x x x",
    "gemma4": "= = l = = = = w lw lw",
    "gemma4_v2": "= = l = = = = = l l",
    "gemma4_v3": "= = l = = = = w lw lw",
    "gemma4_v4": "= = l = = = = w lw lw",
    "gemma4_v5": "= = lw lw = = = w lw lw",
    "gemma_training": "= = l = x el x x x x",
    "glm4moe": "n n lw lw n = n n lw lw",
    "glm4moe_training": "= = lw lw = = = = lw lw",
    "gptoss": "w w lw lw w = lw lw lw x",
    "gptoss_training": "hw hw hlw hlw hw h hlw hlw hlw x",
    "idefics3": "= = l = el el el l el l",
    "idefics3_training": "= = l = el el el l el l",
    "lfm2": "= = l = el el el l el l",
    "lfm2_2_5": "= = lw lw = = = = lw lw",
    "lfm2_2_5_v2": "= = lw lw = = = = lw lw",
    "lfm2_2_5_vl": "= = lw lw = = = = lw lw",
    "lfm2_training": "= = l = el el el l el l",
    "lfm2_v2": "= = l = = = = = l l",
    "lfm2_v2_training": "= = l = = = = = l l",
    "llama3": "= = l = el el el l el l",
    "llama3_1": "= = l = = = x l l l",
    "llama3_2": "= = l = = = x l l l",
    "llama3_training": "= = l = el el el l el l",
    "llava_next": "= = l = x el x x x x",
    "llava_next_training": "= = l = x el x x x x",
    "muse_glimmer": "= = = = = = = l = l",
    "muse_glimmer_training": "h h h h h h h hl h hl",
    "nemotron_3_5_lightning": "w w lw lw w w w w lw lw",
    "nemotron_3_5_lightning_training": "hw hw hlw hlw hw hw hw hw hlw hlw",
    "nemotron_3_nano": "w w lw lw w w w w lw lw",
    "nemotron_3_nano_training": "hw hw hlw hlw hw hw hw hw hlw hlw",
    "nemotron_3_super": "w w lw lw w w w w lw lw",
    "nemotron_3_super_training": "hw hw hlw hlw hw hw hw hw hlw hlw",
    "nemotron_3_ultra": "w w lw lw w w w w lw lw",
    "nemotron_3_ultra_training": "hw hw hlw hlw hw hw hw hw hlw hlw",
    "phi3": "w w lw w lw el lw lw lw lw",
    "phi3_5": "w w lw w lw el lw lw lw lw",
    "phi3_5_training": "w w lw w elw el elw lw elw lw",
    "phi3_training": "w w lw w elw el elw lw elw lw",
    "qwen2_5": "= = l = = = = = l l",
    "qwen2_5_training": "h h hl h h h h h hl hl",
    "qwen2_5_vl": "= = l = el el el l el l",
    "qwen2_5_vl_training": "= = l = el el el l el l",
    "qwen3": "w w lw lw w = w w lw lw",
    "qwen3_5_nothink": "w w lw lw w = w w lw lw",
    "qwen3_5_nothink_training": "h h hw hw h h h h hw hw",
    "qwen3_5_think": "w w lw lw w = w w lw lw",
    "qwen3_5_think_training": "h h h h h h h h h h",
    "qwen3_6": "w w lw lw w = w w lw lw",
    "qwen3_6_training": "h h h h h h h h h h",
    "qwen3_8": "= = = = = = = = = =",
    "qwen3_8_training": "h h h h h h h h h h",
    "qwen3_instruct_2507": "= = l = = = = = l l",
    "qwen3_instruct_2507_training": "= = l = = = = = l l",
    "qwen3_training": "= = = = = = = = = =",
    "qwen3_vl": "= = l = = = = = l l",
    "qwen3_vl_training": "= = l = = = = = l l",
    "smolvlm": "= = l = el el el l el l",
    "smolvlm_training": "= = l = el el el l el l",
}
_TABLE_OF = "1.16.0"  # templates change with TRL
_MARKERS = re.compile(r"(\{%-?\s*)(end)?generation(\s*-?%\})")


def cells(name):
    """What happens to each shape, as the letters of the table."""
    template = TRL_TEMPLATES[name].read_text(encoding="utf-8")
    # The judge must not see its own markers.
    bare = _MARKERS.sub(lambda found: f"{found[1]}{'endif' if found[2] else 'if true'}{found[3]}", template)
    renderer = ChatRenderer(tokenizer_for(bare))
    judge = ChatRenderer(tokenizer_for(template)) if bare != template else None
    return [_cell(renderer, judge, SHAPES[shape], tools_for(shape)) for shape in COLUMNS]


def _cell(renderer, judge, messages, tools):
    try:
        chat = renderer.render_for_training(messages, tools)
    except TEMPLATE_ERRORS:
        return "x"
    assert chat is not None
    _check(chat)
    learned = [chat.text[start:end] for start, end in chat.spans]
    letters = _of_prefixes(renderer, messages, tools, learned, chat)
    if judge is not None:
        letters |= _of_trl(judge, messages, tools, chat)
    letters |= {"l"} if chat.hidden else set()
    return "".join(sorted(letters)) or "="


def _check(chat):
    """All that the template shows of the model's words is learned, and nothing of anybody else's."""
    ends = [0, *(end for _, end in chat.spans)]
    starts = [*(start for start, _ in chat.spans), len(chat.text)]
    learned = "".join(chat.text[start:end] for start, end in chat.spans)
    others = "".join(chat.text[end:start] for end, start in zip(ends, starts, strict=True))
    assert sorted(chat.spans) == list(chat.spans)
    assert not any(words in learned for words in ("U1?", "U2?", "RULES", "RESULT1", "RESULT2"))
    assert not any(words in others for words in ("Blue.", "Red.", "Hm ", "Let me", "Four.", "Bye.", "Oslo", "Rome"))


def _of_prefixes(renderer, messages, tools, learned, chat):
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    found = [_between(renderer, messages, i, tools, chat.text) for i in turns]
    if None in found:
        if found[-1] is not None and chat.spans and turns[-1] == len(messages) - 1:
            assert found[-1].rstrip() == learned[-1]
        return {"w"}
    letters = set()
    if Hidden.NOTHING in chat.hidden:
        kept = [turn for turn in found if any(c.isalnum() for c in _words(renderer, turn))]
        assert len(kept) == len(found) - chat.hidden[Hidden.NOTHING]
        found, letters = kept, {"e"}
    for judged, ours in zip(found, learned, strict=True):
        if judged.rstrip() == ours:
            continue
        header = renderer.template.header
        if ours.startswith(judged) and renderer.turn_ends.fullmatch(ours[len(judged) :]):
            letters.add("n")
        else:
            assert header
            assert judged.removeprefix(header).rstrip() == ours
            letters.add("p")
    return letters


def _between(renderer, messages, index, tools, text):
    """One turn, if the conversation begins with both of its renders."""
    try:
        before = renderer.render(messages[:index], tools, generation_prompt=True)
        through = renderer.render(messages[: index + 1], tools)
    except TEMPLATE_ERRORS:
        return None
    is_between = text.startswith(before) and text.startswith(through) and len(before) < len(through)
    return text[len(before) : len(through)] if is_between else None


def _of_trl(judge, messages, tools, chat):
    text, letters, left = judge.render(messages, tools), set(), list(chat.spans)
    assert text == chat.text
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = [judge.render(messages[:i], tools, generation_prompt=True) for i in turns]
    marked = judge.template.generation_spans(judge.folded(messages), tools)
    for start, end in marked:
        mine = [span for span in chat.spans if span[0] < end and span[1] > start]
        if not mine:
            assert Hidden.NOTHING in chat.hidden or not text[start:end].strip()
            letters |= {"e"} if text[start:end].strip() else set()
            continue
        first, last = mine[0]
        left = [span for span in left if span != mine[0]]
        if first > start:
            assert any(text[start:first] in prompt for prompt in prompts)
            letters.add("h")
        if last > end and not any(a < last and b > end for a, b in marked):
            assert judge.turn_ends.fullmatch(text[end:last])
            letters.add("m")
    assert not left
    return letters


def _words(renderer, turn):
    return renderer.turn_ends.sub("", turn)


@pytest.mark.parametrize("name", TRL_TEMPLATES)
def test_what_is_learned_beside_two_judges(name):
    found = cells(name)
    if Version(trl.__version__) == Version(_TABLE_OF):
        assert found == VERDICTS[name].split()


if __name__ == "__main__":  # writes the table anew
    for template in TRL_TEMPLATES:
        print(f'    "{template}": "{" ".join(cells(template))}",')


def test_a_turn_ends_at_a_plain_tag_if_the_template_ends_turns_with_it():
    """Tokens added by hand are no special ones; the end of an answer is the same for rows, references and decoding."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<eot>", "<think>", "</think>"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<eot>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>b</think>"}] * 2
    chat = ChatRenderer(tokenizer).render_for_training(turns)
    assert chat is not None
    assert [chat.text[a:b] for a, b in chat.spans] == ["<think>b</think><eot>"] * 2
    assert not chat.ends_open
    assert chat.answers == {0: "<think>b</think>", 1: "<think>b</think>"}
