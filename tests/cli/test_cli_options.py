"""Commands and options are a contract: a change here requires a changelog entry."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer.main

from nipq_search.cli import main
from nipq_search.cli.app import app

OPTIONS = {
    "run": {"CONFIG", "--out", "--set", "--trials", "--address"},
    "submit": {"CONFIG", "--address", "--out", "--set", "--trials"},
    "plan": {"CONFIG", "--set", "--json"},
    "status": {"DIR", "--json"},
    "front": {"DIR", "--json"},
    "show": {"DIR", "TRIAL", "--json"},
    "logs": {"DIR", "TRIAL", "--json"},
    "best": {"DIR", "--max", "--json"},
    "stop": {"DIR"},
    "replay": {"DIR", "TRIAL", "--json"},
    "sync": {"DIR"},
    "gc": {"DIR", "--dry-run", "--json"},
    "report": {"DIR", "--open"},
    "ui": {"DIR", "--mlflow-port", "--optuna-port"},
    "doctor": {"[CONFIG]", "--address", "--out", "--json"},
}


def test_commands_and_options_are_frozen():
    group = typer.main.get_command(app)
    found = {
        name: {
            parameter.metavar if parameter.param_type_name == "argument" else parameter.opts[0]
            for parameter in command.params
        }
        for name, command in group.commands.items()
    }
    assert found == OPTIONS
    assert {option for parameter in group.params for option in parameter.opts} <= {"--help"}


@pytest.mark.parametrize("command", OPTIONS)
def test_every_command_has_help(command, capsys):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert all(option in out for option in OPTIONS[command])


def test_no_arguments_print_the_help(capsys):
    assert main([]) == 0
    assert "Exit codes" in capsys.readouterr().out


def test_help_imports_no_heavy_modules():
    program = (
        "import sys; from nipq_search.cli import main; code = main(['--help']);"
        "heavy = {'torch', 'ray', 'optuna', 'mlflow', 'pandas', 'plotly', 'numpy', 'rich'};"
        "print(*sorted(heavy & sys.modules.keys()), file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0
    assert "Commands" in done.stdout
    assert done.stderr.strip() == ""


def test_the_module_behaves_like_the_script():
    command = [sys.executable, "-m", "nipq_search.cli", "front"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
