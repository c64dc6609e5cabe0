"""Small chat templates in the manners of the well-known families, written for these tests.

What it is: one template a manner: what they loop over, what they ask of content, roles and tool arguments, where they refuse.
What it does not know: the families' own tokens and wording.
"""

from __future__ import annotations

PARTS_ONLY = "{% for m in messages %}<{{ m['role'] }}>{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"
"""Content is only ever parts."""

TYPED_PARTS_ONLY = "{% for m in messages %}<{{ m.role }}>{% for p in m.content if p.type == 'text' %}{{ p.text | trim }}{% endfor %}</{{ m.role }}>\n{% endfor %}"

MAPPED_PARTS = "{% for m in messages %}[{{ m.role }}]{{ m.content | map(attribute='text') | join('|') }}\n{% endfor %}"

FIRST_PART_ONLY = "{% for m in messages %}[{{ m.role }}]{{ m['content'][0]['text'] }}\n{% endfor %}"
"""Of several parts all but the first are lost; a string gives nothing."""

FIRST_PART_AND_CALLS = """{%- for m in messages %}[{{ m.role }}]{{ m['content'][0]['text'] }}
    {%- for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}
{%- endfor %}"""

STRINGS_ONLY = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
"""Prints a list as Python would."""

STRIPPED = "{% for m in messages %}[{{ m.role }}]{{ m.content.strip() }}\n{% endfor %}"
"""Fails on a list."""

PARTS_FOR_USERS = """{%- for m in messages %}
{%- if m.role == 'user' %}U:{% for p in m.content %}{{ p.text }}{% endfor %};
{%- else %}{{ m.role }}:{{ m.content + ';' }}
{%- endif %}
{%- endfor %}"""
"""Parts for one role, strings (nothing else: `+`) for the others."""

SYSTEM_IN_FIRST_PART = """{%- if messages[0]['role'] == 'system' %}
    {%- if messages[0]['content'] is string %}{% set first = messages[0]['content'] + '\\n\\n' %}{% else %}{% set first = messages[0]['content'][0]['text'] + '\\n\\n' %}{% endif %}
    {%- set rest = messages[1:] %}
{%- else %}{% set first = '' %}{% set rest = messages %}
{%- endif %}
{%- for m in rest %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Turns must alternate') }}{% endif %}
    {{- '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + (first if loop.first else '') }}
    {%- if m.content is string %}{{ m.content | trim }}{% else %}{% for p in m.content %}{{ p.text | trim }}{% endfor %}{% endif %}
    {{- '</turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}<turn>model\n{% endif %}"""
"""As Gemma 3: turns alternate, and the system message goes into the first; of its parts only the first."""

NO_SYSTEM = """{%- if messages[0].role == 'system' %}{{ raise_exception('No system role here') }}{% endif %}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Turns must alternate') }}{% endif %}
    {{- '<turn>' + m.role + '\\n' + m.content | trim + '\\n' }}
{%- endfor %}"""
"""As Gemma 2."""

NEEDS_SYSTEM = """{%- if messages[0].role != 'system' %}{{ raise_exception('The first message must be of the system') }}{% endif %}
{%- for m in messages %}{{ m.role }}={% for p in m.content %}{{ p.text }}{% endfor %};{% endfor %}"""

VISION = """{%- for m in messages %}
    {{- '<' + m.role + '>' }}
    {%- if m.content is string %}{{ m.content }}
    {%- else %}{% for p in m.content %}{% if p.type == 'image' or 'image_url' in p %}<image>{% elif 'text' in p %}{{ p.text }}{% endif %}{% endfor %}
    {%- endif %}
{%- endfor %}"""
"""As Llama 3.2 and Qwen2-VL: both forms."""

THREE_ROLES = """{%- for m in messages %}
{%- if m['role'] == 'system' %}<|system|>{{ m['content'] }}
{%- elif m['role'] == 'user' %}<|user|>{{ m['content'] }}
{%- elif m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}
{%- endif %}
{%- endfor %}"""
"""As Phi 3 and Zephyr: who else speaks is left out in silence."""

THINKING = """{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set said = m.content %}
        {%- if m.reasoning_content is string %}{% set thought = m.reasoning_content %}
        {%- elif '</think>' in said %}{% set thought = said.split('</think>')[0].split('<think>')[-1] %}{% set said = said.split('</think>')[-1] %}
        {%- endif %}
        {{- '<assistant>' + ('<think>' + thought + '</think>' if thought and loop.last else '') + said }}
    {%- else %}{{ '<' + m.role + '>' + m.content }}
    {%- endif %}
{%- endfor %}"""
"""As Qwen 3: what was thought in earlier turns is left out."""

TEXT_ARGUMENTS = """{{- bos_token }}
{%- set ns = namespace(system='', tool=false) %}
{%- for m in messages if m['role'] == 'system' %}{% set ns.system = m['content'] %}{% endfor %}
{{- ns.system }}
{%- for m in messages %}
    {%- if m['role'] == 'user' %}{{ '<User>' + m['content'] }}{% endif %}
    {%- if m['role'] == 'assistant' and m['content'] is none %}
        {%- for tool in m['tool_calls'] %}
            {{- ('<Assistant><calls>' if loop.first else '\\n') + '<call>' + tool['type'] + '<sep>' + tool['function']['name'] + '\\n```json\\n' + tool['function']['arguments'] + '\\n```</call>' }}
        {%- endfor %}
        {{- '</calls>' + eos_token }}
    {%- endif %}
    {%- if m['role'] == 'assistant' and m['content'] is not none %}
        {{- '<Assistant>' + m['content'].split('</think>')[-1] + eos_token }}
    {%- endif %}
    {%- if m['role'] == 'tool' %}{{ '<output>' + m['content'] + '</output>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<Assistant><think>\\n' }}{% endif %}"""
"""As DeepSeek R1 and V3: arguments are spliced, and calls come out only where content is null."""

PRINTED_ARGUMENTS = """{%- for m in messages %}<{{ m.role }}>{{ m.content or '' }}
    {%- for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments }}</call>{% endfor %}
{%- endfor %}"""
"""An object comes out as Python's repr."""

EITHER_ARGUMENTS = """{%- for m in messages %}<{{ m.role }}>{% if m.content is not none %}{{ m.content }}{% endif %}
    {%- for c in m.tool_calls or [] %}<call>{{ c.function.name }} {% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}{{ c.function.arguments | tojson }}{% endif %}</call>{% endfor %}
{%- endfor %}"""

JSON_ARGUMENTS = """{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) or (m.role == 'assistant' and not m.tool_calls) %}{{ '<' + m.role + '>' + m.content }}
    {%- elif m.role == 'assistant' %}
        {{- '<assistant>' }}{% if m.content %}{{ m.content }}{% endif %}
        {%- for c in m.tool_calls %}{% if c.function %}{% set c = c.function %}{% endif %}
            {{- '\\n<tool_call>\\n{"name": "' + c.name + '", "arguments": ' }}{{ c.arguments | tojson }}{{ '}\\n</tool_call>' }}
        {%- endfor %}
    {%- elif m.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}<user>{% endif %}
        {{- '<tool_response>' + m.content + '</tool_response>' }}
    {%- elif m.role == 'system' %}{{ '<system>' + m.content }}
    {%- endif %}
{%- endfor %}"""
"""As Qwen 2.5 and Hermes."""

ITEM_ARGUMENTS = """{%- for m in messages %}<{{ m.role }}>{{ m.content }}
    {%- for c in m.tool_calls or [] %}<call={{ c.function.name }}>
        {%- for name, value in c.function.arguments.items() %}<{{ name }}>{{ value if value is string else value | tojson }}</{{ name }}>{% endfor %}</call>
    {%- endfor %}
{%- endfor %}"""
"""As GLM 4.5."""

ITEMS_FILTER = ITEM_ARGUMENTS.replace("arguments.items()", "arguments | items")
"""As Qwen 3 Coder."""

ONE_CALL = """{{- bos_token }}
{%- for m in messages %}
    {%- if not (m.role == 'tool' or 'tool_calls' in m) %}{{ '<h>' + m.role + '</h>' + m.content | trim + '<eot>' }}
    {%- elif 'tool_calls' in m %}
        {%- if m.tool_calls | length != 1 %}{{ raise_exception('One call at a time') }}{% endif %}
        {%- set c = m.tool_calls[0].function %}
        {{- '<h>assistant</h>{"name": "' + c.name + '", "parameters": ' }}{{ c.arguments | tojson }}{{ '}<eot>' }}
    {%- else %}
        {{- '<h>ipython</h>' }}{% if m.content is mapping or m.content is iterable %}{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}{{ '<eot>' }}
    {%- endif %}
{%- endfor %}"""
"""As Llama 3.1: whether a message has the key decides, and a tool's answer comes out as JSON."""

NINE_LETTERS = """{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}
    {%- elif m.tool_calls is defined and m.tool_calls is not none %}
        {{- '[CALLS][' }}
        {%- for c in m.tool_calls %}
            {%- if c.id is not defined or c.id | length != 9 %}{{ raise_exception('Ids of tool calls have nine letters') }}{% endif %}
            {%- set text = c.function | tojson %}
            {{- text[:-1] + ', "id": "' + c.id + '"}' }}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}
    {%- elif m.role == 'tool' %}
        {%- if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}{{ raise_exception('Ids of tool calls have nine letters') }}{% endif %}
        {{- '[RESULTS]{"content": ' + m.content | tojson + ', "id": "' + m.tool_call_id + '"}' }}
    {%- else %}{{ raise_exception('Only user, assistant and tool speak here') }}
    {%- endif %}
{%- endfor %}"""
"""As Mistral 7B v0.3."""

CHANNELS = """{%- set ns = namespace(call='') %}
{%- if messages[0].role in ['system', 'developer'] %}{{ '<|start|>developer<|message|>' + messages[0].content }}{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}
{%- for m in rest %}
    {%- if m.role == 'assistant' and 'tool_calls' in m %}
        {%- set c = m.tool_calls[0].function %}{% set ns.call = c.name %}
        {{- '<|start|>assistant to=functions.' + c.name + '<|message|>' }}{{ c.arguments | tojson }}
    {%- elif m.role == 'assistant' %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}
    {%- elif m.role == 'tool' %}
        {%- if not ns.call %}{{ raise_exception('A result needs its call') }}{% endif %}
        {{- '<|start|>functions.' + ns.call + '<|message|>' + m.content | tojson }}
    {%- elif m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content }}
    {%- endif %}
{%- endfor %}"""
"""As gpt-oss: an answer of a tool is JSON, and needs the call before it."""

LEGACY_CALLS = """{%- for m in messages %}<{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}>{{ m.content or '' }}
    {%- if m.function_call %}<call>{{ m.function_call.name + ' ' + m.function_call.arguments }}</call>{% endif %}
{%- endfor %}"""
"""Knows only the field that came before tool_calls."""

STRINGS_WITH_TOOLS = """{%- if tools %}{{ '<system>' + (messages[0].content + '\\n' if messages[0].role == 'system' else '') }}{{ tools | tojson }}{% endif %}
{%- for m in messages if not (tools and m.role == 'system') %}
    {{- '<' + m.role + '>' }}
    {%- if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}
{%- endfor %}"""
"""Both forms, until there are tools: then the system's must be a string."""

STRINGS_IN_HISTORY = """{%- for m in messages %}
    {{- '<' + m.role + '>' }}
    {%- if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}
    {%- elif m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}
{%- endfor %}"""
"""Both forms, but of what the assistant said in earlier turns."""
