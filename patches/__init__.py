"""The edits to upstream's files, and the tool that applies them to a released apache-airflow-task-sdk.

``changes/NN-name.yml`` holds one change each; they are applied in the order of their file names. A change file is a
multi-document YAML file. Its first document says what the change is::

    change: name                # as in the file's name
    what: one sentence
    why: the fault that it ends
    upstream: whether and where upstream has it, that is: when the change can go
    subject: that of its commit, when it is sent to upstream alone; a change without one is for the wheels alone
    news: one sentence for upstream's users; goes with a subject
    significant: what users have to know where their tasks behave differently: the newsfragment is a significant one, and
        has this below its news; optional
    refers: "closes: #1"        # upstream's issue; optional
    needs: [name, ...]          # changes before it that it builds on; optional
    files: [airflow/sdk/...]    # whole files of ours, below task-sdk/src/, that it brings; may be empty
    shared: [airflow/sdk/...]   # the same for files that several changes bring, whichever comes first; optional
    tests: [task_sdk/...]       # its tests, below task-sdk/tests/, that go along to upstream; several changes may share one
    docs: [docs/...]            # pages of documentation, below task-sdk/, that go along to upstream; optional

An entry of the lists may be for some releases alone: ``airflow/sdk/...: ">=1.3.1"``.

Every further document is an ast-grep rule (https://ast-grep.github.io/reference/yaml.html) with ``id``, ``message`` (what),
``note`` (why) and ``fix``, and with these keys below ``metadata``::

    file: airflow/sdk/...       # upstream's file that it edits; airflow-core/src/... is edited in a checkout alone
    matches: 1                  # how often it must match (1 unless given), or a map from releases to that number
    releases: ">=1.3.1"         # the SDK versions that it is for; all unless given

ast-grep does not read reStructuredText. So a document with ``insert`` is no ast-grep rule, but puts whole lines into a page of
documentation, upstream's or ours: in a checkout alone, because wheels have none::

    id: name
    message: what
    note: why
    metadata: {file: task-sdk/docs/..., ...}    # or docker-stack-docs/..., airflow-core/docs/...
    after: lines                # or before: the whole lines at which, with the blanks before them
    insert: lines               # a block scalar, with the empty lines that they need around them

``releases`` are PEP 440 specifiers, in which 1.4.0b2 is neither ``<1.4`` nor ``>=1.4``: write ``>=1.4.0b1``.

A rule runs on what the rules before it have left. One that matches more or less often than it says is an error, and then
nothing is written: upstream's code has changed, and somebody has to look.

``python -m patches --help`` shows the commands. The modules, from the inside out: ``errors``, ``commands`` (running other
programs), ``releases`` (the table in pyproject.toml), ``upstream`` (verified downloads), ``rules`` (change files and their
application to a tree), ``wheels`` (patched wheels), ``checking`` (a release that may be new), ``prereleases`` (those that
the index has), ``linting``, ``checkouts`` (commits in a git checkout), ``environments`` (a checkout's ruff, and a release for
mypy), ``styling`` (a checkout's ruff configuration), ``type_checking`` (its mypy configuration), ``pull_requests`` and
``breeze``.
"""
