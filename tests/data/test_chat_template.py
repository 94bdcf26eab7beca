"""Chat templates, against transformers' rendering."""

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from moe_peft.data.chat_template import render_chat

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = '<<SYS>>\\n' + messages[0]['content'] | trim + '\\n<</SYS>>\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + (system if loop.first else '') + message['content'] | trim + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] | trim + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}
"""
WHITE_SPACE = """
{# a comment #}
  {% for message in messages %}
  {% if message.role == "user" %}
    U: {{ message.content }}
  {% else %}
    A: {{ message.content }}
  {% endif %}
  {% endfor %}
done
"""
EVERYTHING = """
{%- set ns = namespace(count=0, last=none) -%}
{%- for message in messages -%}
{%- if message.role == 'system' %}{% continue %}{% endif -%}
{%- set ns.count = ns.count + 1 -%}
{%- set ns.last = message.content -%}
{{ message | tojson }}{{ message.content | tojson(indent=2) }}{{ {'b': 'é<', 'a': [1, none]} | tojson(sort_keys=true) }}
{% generation %}{{ message.content | upper }}{% endgeneration %}
{%- if ns.count > 2 %}{% break %}{% endif -%}
{%- endfor -%}
{{ ns.count }}{{ ns.last }}{{ tools is none }}{{ documents is none }}{{ unknown_token is defined }}
{{- strftime_now('%Y')[:2] -}}{{ dict(a=1).a }}
"""

CHAT = [
    {"role": "user", "content": ' What <is> "2" + 2? \u00e9 '},
    {"role": "assistant", "content": "Four.\n", "tool_calls": None},
    {"role": "user", "content": "{{ bos_token }}{% raw %}"},
    {"role": "assistant", "content": "5", "extra": [1, {"a": 2}]},
]
WITH_SYSTEM = [{"role": "system", "content": " Be brief.\n"}, *CHAT]


@pytest.mark.parametrize("template", [CHATML, LLAMA2, WHITE_SPACE, EVERYTHING])
@pytest.mark.parametrize("messages", [CHAT, WITH_SYSTEM, CHAT[:1], CHAT[:3]])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_rendering_equals_transformers(template, messages, add_generation_prompt):
    ours = render_chat(template, messages, special_tokens=SPECIAL, add_generation_prompt=add_generation_prompt)
    present = [{key: value for key, value in message.items() if value is not None} for message in messages]
    theirs, _ = render_jinja_template(
        [present], chat_template=template, add_generation_prompt=add_generation_prompt, **SPECIAL
    )
    assert [ours] == theirs


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", r"the chat template does not compile: line 1: "),
        ("a\n{{ x }\n", r"the chat template does not compile: line 2: "),
        ("{% endfor %}", r"does not compile"),
        ("{{ raise_exception('no system turns, please') }}", r"refused the conversation: no system turns, please"),
        ("{{ missing.name }}", r"refused the conversation: 'missing' is undefined"),
        ("{{ 1 / 0 }}", r"failed with ZeroDivisionError"),
        ("{{ 'a' + 1 }}", r"failed with TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", r"failed with RecursionError"),
        # The sandbox.
        ("{{ ''.__class__.__mro__ }}", r"access to attribute '__class__'"),
        ("{{ messages.append(1) }}", r"refused the conversation: .*append"),
        ("{{ messages[0].update(a=1) }}", r"refused the conversation: .*update"),
        ("{{ raise_exception.__globals__.json }}", r"__globals__"),
        ('{{ strftime_now.__globals__["json"] }}', r"__globals__"),
        ("{% set n = namespace(_x=1) %}", r"begins with an underscore"),
        ("{% set n = namespace() %}{% set n.__class__ = 1 %}", r"begins with an underscore"),
        ("{% for i in range(999999999) %}{% endfor %}", r"failed with OverflowError"),
    ],
)
def test_what_fails_is_a_value_error(template, message):
    with pytest.raises(ValueError, match=message):
        render_chat(template, CHAT, special_tokens={})


@pytest.mark.parametrize("messages", [[object()], [{"role": "user", "content": object()}], ["text"], 3])
def test_messages_must_be_plain_data(messages):
    with pytest.raises(ValueError, match="messages must be a list of mappings of plain data"):
        render_chat("x", messages, special_tokens={})


def test_the_caller_s_messages_stay_as_they_are():
    messages = [{"role": "user", "content": None}]
    render_chat("{{ messages }}", messages, special_tokens={})
    assert messages == [{"role": "user", "content": None}]
