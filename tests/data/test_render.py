"""Rows of every known shape become one text, and a malformed row is named."""

import pytest
from checks import message_of

from newllm.data.files import render


def test_messages_become_lines_with_roles():
    """Role capitalized, content stripped, messages without content left out."""
    row = {
        "messages": [
            dict(role="user", content=" hi "),
            dict(role="assistant", content=""),
            dict(role="user", content="a\nb"),
        ]
    }
    assert render(row, "row 1") == "User: hi\nUser: a\nb"


def test_data_alternates_between_user_and_assistant():
    assert (
        render({"id": 1, "data": ["one", "two", "three"]}, "row 1")
        == "User: one\nAssistant: two\nUser: three"
    )


def test_text_is_taken_as_it_is():
    assert render({"text": "just this\n"}, "row 1") == "just this"


@pytest.mark.parametrize(
    "row, column, text",
    [
        (
            {"conversations": [{"from": "human", "value": " a "}, {"from": "gpt", "value": "b"}]},
            "",
            "User: a\nAssistant: b",
        ),
        (
            {"conversations": [{"from": "system", "value": "a"}, {"from": "Human", "value": "b"}]},
            "",
            "System: a\nUser: b",
        ),
        ({"conversations": [{"role": "user", "content": "a"}]}, "", "User: a"),
        ({"messages": [{"role": "user"}, {"role": "user", "content": "a"}]}, "", "User: a"),
        (
            {"messages": [{"role": "assistant", "content": None}, {"role": "tool", "content": "a"}]},
            "",
            "Tool: a",
        ),
        ({"messages": [{"role": "assistant"}, {"role": "tool", "content": "a"}]}, "", "Tool: a"),
        ({"messages": [{"role": None, "content": None, "from": "gpt", "value": "a"}]}, "", "Assistant: a"),
        ({"messages": [{"role": "human", "content": "a"}]}, "", "Human: a"),
        ({"prompt": "a", "response": "b", "n": 1}, "", "User: a\nAssistant: b"),
        ({"prompt": "a", "completion": "b", "response": None}, "", "User: a"),
        ({"instruction": "a", "input": "b", "output": "c"}, "", "User: a\nb\nAssistant: c"),
        ({"instruction": "a", "input": "", "output": "c"}, "", "User: a\nAssistant: c"),
        ({"question": "a", "answer": "b"}, "", "User: a\nAssistant: b"),
        ({"messages": None, "text": "a", "prompt": "b", "response": "c"}, "", "a"),
        ({"text": "a", "story": "b"}, "story", "b"),
        ({"text": "a", "story": ["b", "c"]}, "story", "User: b\nAssistant: c"),
        ({"talk": [{"from": "gpt", "value": "a"}]}, "talk", "Assistant: a"),
        ({"talk": [{"role": "user", "content": "a"}]}, "talk", "User: a"),
        ({"instruction": "a", "input": "b", "output": "c"}, "instruction,output", "User: a\nAssistant: c"),
        ({"a": "x", "b": None}, "a, b", "User: x"),
        ({"a": None}, "a", ""),
        ({"text": None}, "", ""),
        ({"text": ""}, "", ""),
        ({"messages": None}, "", ""),
        ({"messages": []}, "", ""),
        ({"prompt": None, "response": None}, "", ""),
        ({"prompt": None, "response": "b"}, "", "Assistant: b"),
        ({"instruction": None, "input": " b ", "output": "c"}, "", "User: b\nAssistant: c"),
        ({"messages": None, "prompt": "a", "response": "b"}, "", "User: a\nAssistant: b"),
    ],
)
def test_shapes_of_dialogues(row, column, text):
    """ShareGPT turns, pairs, and any of these in a chosen column; what was read before them is preferred as before."""
    assert render(row, "row 1", column) == text


@pytest.mark.parametrize(
    "row, words",
    [
        ([1], "is a list, not an object"),
        ({"prompt": "x", "n": 1}, "its keys are: prompt, n."),
        (
            {"messages": [{"speaker": "a", "value": "b"}]},
            "does not have a list of texts or of objects with role and content or from and value in messages",
        ),
        ({"messages": "hi"}, "does not have a list"),
        ({"messages": [{"role": " ", "content": "a"}]}, "does not have a list"),
        ({"messages": 3}, "does not have a list"),
        ({"data": ["a", 3]}, "does not have a list of texts"),
        ({"data": "hi"}, "does not have a list of texts"),
        ({"text": 3}, "does not have a text in text"),
        ({"prompt": "a", "response": 3}, "does not have texts in prompt and response"),
        ({"instruction": "a", "input": 3, "output": "b"}, "does not have texts in instruction and output"),
        ({"text": "\ud83d"}, "lone surrogate"),
        *(
            ({"text": value}, "a text in text (found: ")
            for value in (0, False, 1.5, {}, {"a": 1}, [], ["a"], [["a"]])
        ),
        *(
            ({"messages": value}, "in messages (found: ")
            for value in (0, False, "", {}, {"role": "user", "content": "a"})
        ),
        *(({"data": [value]}, "does not have a list of texts") for value in (None, 0, ["a"], {}, True)),
        *(
            ({"messages": [{"role": "user", "content": value}]}, "does not have a list of texts")
            for value in (0, False, ["a"], {}, [{"type": "text", "text": "a"}])
        ),
        ({"messages": [{"role": " ", "content": "a"}]}, "does not have a list of texts"),
        ({"prompt": {"role": "user", "content": "a"}, "response": "b"}, "texts in prompt and response"),
        ({"prompt": ["a"], "response": "b"}, "texts in prompt and response"),
        *(
            ({"instruction": "a", "input": value, "output": "b"}, "texts in instruction")
            for value in (0, [], {}, False)
        ),
    ],
)
def test_malformed_row_is_named(row, words):
    """The sentence says where and what."""
    text = message_of(render, row, "talk.jsonl line 7")
    assert text.startswith("talk.jsonl line 7 ") and words in text
