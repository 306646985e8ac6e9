"""An installation that cannot drift: the lock, the environment the scripts use, and whose modules they import."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
SETUP = runpy.run_path(str(ROOT / "setup.py"))
INSTALLED = [*SETUP["CORE"], *SETUP["EXTRAS"]["eval-light"], *SETUP["EXTRAS"]["test"], SETUP["LMMS_EVAL"]]
LINUX = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "extra": ""}
CUDA = ("nvidia-", "cuda-", "triton")


def entries(name: str) -> dict[str, tuple[Requirement, list[str]]]:
    """A lock file's releases and their hashes, by name."""
    text = re.sub(r"#.*", "", (ROOT / "requirements" / f"{name}.txt").read_text()).replace("\\\n", " ")
    found = {}
    for line in filter(str.strip, text.splitlines()):
        head, *hashes = line.split("--hash=")
        need = Requirement(head)
        assert canonicalize_name(need.name) not in found, f"{need.name} is locked twice"
        found[canonicalize_name(need.name)] = need, [one.strip() for one in hashes]
    return found


def shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run a line of bash with this Python first on PATH and nothing of ours in the environment."""
    binaries = Path(sys.executable).parent
    ours = ("PYTHON", "VIRTUAL_ENV", "INSTALLER", "MODEL", "MODEL_BASE", "RETAIN", "LIMIT", "OUT", "BATCH_SIZE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    settings = {**kept, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=settings, capture_output=True, text=True, timeout=120
    )


def stub(file: Path, cases: str) -> Path:
    """A program that answers by its arguments, as the branches of a shell `case`, and logs them beside itself."""
    file.write_text(f'#!/bin/bash\necho "$*" >>"{file.parent}/calls"\ncase "$*" in\n{cases}\nesac\n')
    file.chmod(0o755)
    return file


def bare_path(folder: Path) -> str:
    """A PATH with what a shell script needs, and no Python."""
    (folder / "bin").mkdir(exist_ok=True)
    for name in ("bash", "awk", "cat", "cp", "dirname", "mkdir", "mktemp", "rm", "touch", "flock"):
        if (found := shutil.which(name)) and not (folder / "bin" / name).exists():
            (folder / "bin" / name).symlink_to(found)
    return str(folder / "bin")


def copy_of_scripts(folder: Path) -> Path:
    """A checkout of what the setup reads, in which it may write."""
    for name in ("scripts", "requirements"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "setup.py", folder)
    return folder


class TestLock:
    @pytest.mark.parametrize("need", INSTALLED)
    def test_has_what_the_scripts_need_inside_its_range(self, need):
        need = Requirement(need)
        locked = (entries("torch") if need.name == "torch" else entries("lock"))[canonicalize_name(need.name)][0]
        (pin,) = locked.specifier
        assert pin.operator == "==" and need.specifier.contains(pin.version), (str(need), str(locked))

    @pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
    def test_holds_for_every_python(self, python):
        """One release of each package serves all: what setup.py names is locked for every Python of the range."""
        assert SpecifierSet(SETUP["PYTHON"]).contains(f"{python}.0")
        versions = {**LINUX, "python_version": python, "python_full_version": f"{python}.0"}
        lock = {**entries("lock"), **entries("torch")}
        for need in map(Requirement, INSTALLED):
            marker = lock[canonicalize_name(need.name)][0].marker
            assert marker is None or marker.evaluate(versions), need.name

    def test_every_file_but_torch_has_hashes(self):
        for name in ("lock", "cuda"):
            for package, (need, hashes) in entries(name).items():
                assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", one) for one in hashes), package
                assert [pin.operator for pin in need.specifier] == ["=="] and need.url is None, package
        assert list(entries("torch")) == ["torch"] and entries("torch")["torch"][1] == []
        assert re.fullmatch(r"torch==[\d.]+\n", (ROOT / "requirements" / "torch.txt").read_text()), "no local version"

    def test_cuda_is_apart(self):
        """A machine without a GPU installs lock.txt alone; torchvision fits no CPU build of torch."""
        assert all(name.startswith(CUDA) for name in entries("cuda")) and len(entries("cuda")) > 10
        assert not [name for name in entries("lock") if name.startswith((*CUDA, "torch"))]

    @pytest.mark.parametrize("file", sorted((ROOT / "requirements").iterdir()), ids=lambda file: file.name)
    def test_names_no_index_and_no_path(self, file):
        lines = file.read_text().splitlines()
        assert not [line for line in lines if re.search(r"://|file:|^-|--index|--find-links|--extra|\s/\w| @ ", line)]


class TestPython:
    def test_ranges_agree(self):
        """setup.sh and the linter cannot read setup.py before there is a Python: they repeat its range."""
        assert SETUP["PYTHON"] == ">=3.11,<3.14"
        assert "(3, 11) <= sys.version_info < (3, 14)" in (SCRIPTS / "setup.sh").read_text()
        assert 'target-version = "py311"' in (ROOT / "pyproject.toml").read_text()

    @pytest.mark.parametrize("version", ["3.10.13", "3.14.0", "2.7.18"])
    def test_other_versions_are_refused_in_one_line(self, version, tmp_path):
        checkout = copy_of_scripts(tmp_path / "checkout")
        python = stub(tmp_path / "python-of-another-age", f'*platform*) echo "Python {version}" ;; *) exit 1 ;;')
        done = shell(f"bash '{checkout}/scripts/setup.sh'", tmp_path, PYTHON=str(python), PATH=bare_path(tmp_path))
        assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
        assert f"PYTHON: got '{python}' (Python {version}), expected Python 3.11 to 3.13" in done.stderr
        assert not (checkout / ".venv").exists()

    def test_missing_interpreter_is_one_line(self, tmp_path):
        checkout = copy_of_scripts(tmp_path / "checkout")
        done = shell(f"bash '{checkout}/scripts/setup.sh'", tmp_path, PYTHON="python9", PATH=bare_path(tmp_path))
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and "no Python that runs" in done.stderr

    def test_an_environment_of_somebody_elses_is_not_thrown_away(self, tmp_path):
        checkout = copy_of_scripts(tmp_path / "checkout")
        (checkout / ".venv" / "bin").mkdir(parents=True)
        stub(checkout / ".venv" / "bin" / "python", '*platform*) echo "Python 3.10.13" ;; *) exit 1 ;;')
        done = shell(f"bash '{checkout}/scripts/setup.sh'", tmp_path, PATH=bare_path(tmp_path))
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert "got Python 3.10.13, expected Python 3.11 to 3.13; move it away" in done.stderr
        assert (checkout / ".venv" / "bin" / "python").exists()


class TestEnvironment:
    """What scripts/environment.py says about the Python that runs it."""

    @pytest.fixture
    def environment(self, monkeypatch):
        """Its functions, and a dict of versions to pretend."""
        module = runpy.run_path(str(SCRIPTS / "environment.py"))
        pretended, true = {}, module["version"]
        names = module["complete"].__globals__
        monkeypatch.setitem(names, "version", lambda name: pretended.get(name, true(name)))
        return module, pretended

    def test_all_declared_at_their_lower_ends_is_complete(self, environment):
        module, pretended = environment
        for need in map(Requirement, INSTALLED):
            pretended[need.name] = next(pin.version for pin in need.specifier if pin.operator in (">=", "=="))
        assert module["complete"]() == []

    @pytest.mark.parametrize(
        ("name", "version", "reason"),
        [
            ("transformers", "4.57.1", "transformers is 4.57.1, expected <6,>="),
            ("transformers", "6.0.0", "transformers is 6.0.0"),
            ("torch", "2.1.0+cu118", r"torch is 2.1.0\+cu118"),
            ("tqdm", None, "tqdm is missing"),
            ("lmms_eval", "0.8.0", "lmms-eval is 0.8.0, expected ==0.7.3"),
            ("python", "3.10.13", "python is 3.10.13, expected <3.14,>=3.11"),
            ("python", "3.14.0", "python is 3.14.0"),
        ],
    )
    def test_what_is_outside_the_ranges_is_named(self, environment, name, version, reason):
        module, pretended = environment
        self.test_all_declared_at_their_lower_ends_is_complete(environment)
        pretended[name.replace("_", "-")] = version
        (found,) = module["complete"]()
        assert re.match(reason, found)

    def test_locked_means_the_very_versions(self, environment, monkeypatch):
        module, pretended = environment
        for need, _ in {**entries("lock"), **entries("torch")}.values():
            pretended[need.name] = next(iter(need.specifier)).version
        pretended["torch"] += "+cpu"
        monkeypatch.setitem(module["verified"].__globals__, "needs_of_torch", lambda: [])
        assert module["verified"]() == []
        pretended["transformers"] = "5.0.0"
        (found,) = module["verified"]()
        assert found.startswith("transformers is 5.0.0, expected ==")

    def test_a_package_that_was_unpacked_in_part_is_missing(self, environment, tmp_path, monkeypatch):
        module, _ = environment
        folder = tmp_path / "halfway-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: halfway\nVersion: 1.0\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        assert module["version"]("halfway") is None
        (folder / "RECORD").write_text("")
        assert module["version"]("halfway") == "1.0"


class TestSetup:
    """scripts/setup.sh with a Python that only pretends to install."""

    PYTHON = """
    *"-m venv"*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" && touch "${@: -1}/bin/activate" ;;
    *environment.py\\ finish) [ -z "${BROKEN:-}" ] || { echo "tqdm is missing"; exit 1; } ;;
    *environment.py*) exit 1 ;;
    *"uv pip install"*) exit "${UV_STATUS:-0}" ;;
    *"pip install"*lock.txt*) exit "${PIP_STATUS:-0}" ;;
    """

    @pytest.fixture
    def checkout(self, tmp_path) -> Path:
        folder = copy_of_scripts(tmp_path / "checkout")
        stub(tmp_path / "python", self.PYTHON)
        return folder

    def run(self, checkout: Path, **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        """Its result, and the calls of .venv's Python."""
        folder = checkout.parent
        settings = {"PYTHON": str(folder / "python"), "PATH": bare_path(folder), **environment}
        done = shell(f"bash '{checkout}/scripts/setup.sh'", folder, **settings)
        calls = folder / "calls"
        return done, calls.read_text().splitlines() if calls.is_file() else []

    def test_installs_the_lock_and_nothing_beside_it(self, checkout):
        done, calls = self.run(checkout)
        assert done.returncode == 0 and "setup: done" in done.stderr.splitlines(), done.stderr
        installs = [call for call in calls if "pip install" in call]
        assert [re.findall(r"(tmp|lock|torch|cuda)[.\w]*(?: |$)", call + " ")[-1:] for call in installs[1:3]] == [
            ["lock"],
            ["torch"],
        ]
        assert all("--require-hashes --no-deps" in call for call in installs[:2])
        assert all("torch.txt" in call or "--editable" in call for call in installs[2:])

    def test_an_active_environment_that_has_everything_is_used_as_it_is(self, checkout):
        reasons = shell(f"python '{SCRIPTS / 'environment.py'}' complete", checkout)
        if reasons.returncode:
            pytest.skip(f"this one has not: {reasons.stderr.strip()}")
        done = shell(f"source '{checkout}/scripts/setup.sh' && command -v python && echo $PYTHONPATH", checkout)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        assert done.stdout.splitlines() == [str(Path(sys.executable).parent / "python"), str(checkout)]
        assert not (checkout / ".venv").exists()

    def test_what_was_interrupted_is_made_anew(self, checkout):
        (checkout / ".venv").mkdir()
        (checkout / ".venv" / ".mustdrop").write_text("unfinished\n")
        (checkout / ".venv" / "half").touch()
        done, _ = self.run(checkout)
        assert done.returncode == 0 and not (checkout / ".venv" / "half").exists(), done.stderr

    def test_failure_is_said_and_leaves_a_mark(self, checkout):
        done, _ = self.run(checkout, UV_STATUS="1", PIP_STATUS="1")
        assert done.returncode == 1 and "setup: pip failed" in done.stderr.splitlines()[-1]
        assert (checkout / ".venv" / ".mustdrop").read_text() == "unfinished\n"

    def test_pip_does_what_uv_cannot(self, checkout):
        done, calls = self.run(checkout, UV_STATUS="1")
        assert done.returncode == 0 and "going on with pip" in done.stderr
        assert any(re.search(r"-m pip install .*--require-hashes .*requirements/lock.txt", call) for call in calls)
        done, calls = self.run(checkout, INSTALLER="pip")
        assert done.returncode == 0 and "going on with pip" not in done.stderr

    def test_an_environment_that_is_not_what_the_lock_says_is_an_error(self, checkout):
        done, _ = self.run(checkout, BROKEN="1")
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].endswith(".venv is still not what requirements/ says: tqdm is missing")

    def test_an_update_that_does_not_mend_it_begins_anew(self, checkout):
        self.run(checkout)
        (checkout / ".venv" / ".mustdrop").write_text("of an older lock")
        (checkout / ".venv" / "old").touch()
        done, _ = self.run(checkout)
        assert done.returncode == 0 and (checkout / ".venv" / "old").exists(), "an update keeps what is there"
        done, _ = self.run(checkout, BROKEN="1")
        assert done.returncode == 1 and not (checkout / ".venv" / "old").exists()


class TestWhoseModules:
    """The working directory and PYTHONPATH hold another ``llava`` and another ``eval``."""

    @pytest.fixture
    def foreign(self, tmp_path) -> Path:
        for name in ("llava", "eval"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text(f"print('foreign {name}')\n")
        return tmp_path

    def test_every_script_begins_with_the_setup(self):
        apart = {"setup.sh", "uv.sh", "lock.sh", "test_range.sh"}  # these run nothing of ours outside its own settings
        for script in SCRIPTS.glob("*.sh"):
            if script.name not in apart:
                assert 'source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"' in script.read_text(), script.name
                moves = re.search(r"^cd ", script.read_text(), flags=re.MULTILINE)
                assert not moves or script.name == "test.sh", "relative paths are the user's"

    def test_scripts_use_this_checkouts(self, foreign):
        done = shell(f"source '{SCRIPTS}/setup.sh' && python -m mustdrop_command run --retain many", foreign)
        assert "error: RETAIN: got 'many'" in done.stderr and "foreign" not in done.stdout, done.stderr[-2000:]

    def test_relative_paths_are_the_users(self, foreign):
        (foreign / "mine").mkdir()
        (foreign / "file").touch()
        for variables, message in {"MODEL=./mine": "config.json", "OUT=file": "expected a folder"}.items():
            done = shell(f"{variables} bash '{SCRIPTS}/eval_gqa.sh'", foreign)
            assert done.returncode == 2 and message in done.stderr, done.stderr[-2000:]

    def python(self, code: str, foreign: Path, *paths: Path, safe: bool = True) -> subprocess.CompletedProcess:
        command = f"{sys.executable} {'-P' if safe else ''} -c '{code}'"
        return shell(command, foreign, PYTHONPATH=os.pathsep.join(map(str, paths)))

    def test_command_uses_this_checkouts(self, foreign):
        code = (
            "import sys, os; sys.argv = ['mustdrop', '--help']; import mustdrop_command; mustdrop_command.main(); "
            "import eval, llava; print(eval.__file__, llava.__file__); "
            "os.system(sys.executable + ' -m llava.conversation; ' + sys.executable + ' -m eval.cli')"
        ).replace("'", '"')
        done = self.python(code, foreign, foreign, ROOT)
        assert done.stdout.count("usage: mustdrop") == 2 and "foreign" not in done.stdout, done.stdout + done.stderr
        assert f"{ROOT / 'eval' / '__init__.py'} {ROOT / 'llava' / '__init__.py'}" in done.stdout

    @pytest.mark.parametrize("name", ["eval", "llava"])
    def test_command_refuses_others_in_one_line(self, foreign, name):
        code = f"import {name}, sys, mustdrop_command; sys.exit(mustdrop_command.main())"
        done = self.python(code, foreign, ROOT, safe=False)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert f"error: {name}: got {foreign / name}, expected {ROOT / name}" in done.stderr

    def test_plugin_uses_this_checkouts(self, foreign):
        code = "import mustdrop_command; print(mustdrop_command.manifest().simple_class_path); import eval, llava; "
        done = self.python(code + "print(eval.__file__, llava.__file__)", foreign, ROOT, safe=False)
        assert done.stdout.splitlines() == [
            "eval.run.lmms.LlavaMustDrop",
            f"{ROOT / 'eval' / '__init__.py'} {ROOT / 'llava' / '__init__.py'}",
        ], done.stderr[-2000:]

    def test_folders_that_are_no_packages_do_not_matter(self, tmp_path):
        """Data lie in a folder called llava, and the checkout is called mustdrop: its parent is no package."""
        for name in ("llava", "mustdrop"):
            (tmp_path / name).mkdir()
        code = 'import eval, importlib.util as util; print(*(util.find_spec(n).origin for n in ("llava", "mustdrop")))'
        done = self.python(code, tmp_path, ROOT, safe=False)
        assert done.stdout.split() == [str(ROOT / name / "__init__.py") for name in ("llava", "mustdrop")], done.stderr
