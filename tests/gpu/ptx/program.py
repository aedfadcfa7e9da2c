"""An entry of a module as a program of the machine."""

from __future__ import annotations

import re

from tests.gpu.ptx.encoder import Encoder, operands
from tests.gpu.ptx.matrices import MATRICES
from tests.gpu.ptx.rules import RULES, arithmetic
from tests.gpu.ptx.text import BYTES, Entry, Module, PtxError, Statement

LINE = re.compile(r"(?:@(!?)([\w$%.]+)\s+)?([\w.:$]+)\s*(.*)", re.DOTALL)
SHARED = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$.]+)(\[\d+\])?")
DYNAMIC_ALIGNMENT = 1024


class Program(Encoder):
    """A kernel, encoded; `dynamic_at` is where the launch's shared memory begins."""

    def __init__(self, module: Module, entry: Entry) -> None:
        super().__init__(module, entry)
        self._calls = 0
        self._body(entry, "")
        self.emit("exit", ())
        self.dynamic_at = -(-self.shared_end // DYNAMIC_ALIGNMENT) * DYNAMIC_ALIGNMENT

    # --- statements

    def _body(self, entry: Entry, prefix: str) -> None:
        at = entry.body[0]
        try:
            for statement in self.module.statements(entry):
                at = statement.at
                self._statement(statement, prefix)
        except (PtxError, KeyError, ValueError, IndexError) as error:
            line, words = self.module.line(at), " ".join(self.words.split())
            raise PtxError(f"line {line}: {words}: {error!r}") from error

    def _statement(self, statement: Statement, prefix: str) -> None:
        words = statement.text
        self.at, self.words, self.guard = statement.at, words, (-1, False)
        if statement.label:
            self.labels[prefix + words] = len(self.code)
        elif words == "{":
            self.registers.open()
        elif words == "}":
            self.registers.close()
        elif words.startswith((".reg", ".param")):
            self.registers.declare(words)
        elif words.startswith(".shared"):
            self._shared_variable(words)
        elif words.startswith("."):
            raise PtxError("a directive that is not known")
        else:
            self._instruction(words, prefix)

    def _shared_variable(self, words: str) -> None:
        match = SHARED.match(words)
        if match is None:
            raise PtxError("a shared variable")
        align, kind, name, length = match.groups()
        count = int(length[1:-1]) if length else 1
        self.place_variable(name, int(align or BYTES[kind]), BYTES[kind] * count)

    def _instruction(self, words: str, prefix: str) -> None:
        match = LINE.match(words)
        if match is None:
            raise PtxError("no instruction")
        negated, guard, op, rest = match.groups()
        if guard:
            self.guard = (self.registers.find(guard).slot, negated == "!")
        parts = op.split(".")
        arguments = operands(rest)
        if parts[0] == "call":
            self._call(arguments, prefix)
        elif parts[0] == "bra":
            self.emit("bra", (), target=prefix + arguments[0])
        elif parts[0] == "ret" and prefix:
            self.emit("bra", (), target=prefix + "return")
        else:
            rule = MATRICES.get(parts[0]) or RULES.get(parts[0], arithmetic)
            rule(self, parts, arguments)

    def _call(self, arguments: list[str], prefix: str) -> None:
        """The function's body in place of the call; its parameters are the call's registers."""
        if prefix:
            raise PtxError("a call within a function")
        results, name, given = arguments
        function = self.module.functions[name]
        self._calls += 1
        self.registers.open()
        for names, parameters in ((given, function.parameters), (results, function.results)):
            for word, parameter in zip(operands(names[1:-1]), parameters, strict=True):
                self.registers.name(parameter.name, self.registers.find(word))
        self._body(function, f"{self._calls}:")
        self.registers.close()
        self.labels[f"{self._calls}:return"] = len(self.code)
