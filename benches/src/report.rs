//! The report: medians and ratios as Markdown, with the machine and the versions.

use crate::peers::Program;
use crate::{Round, Work};
use anyhow::Context;
use std::fmt::Write;
use std::path::Path;

/// Ends a part of a document.
const END: &str = "<!-- end -->";

/// The rounds of a program.
pub(crate) struct Measured<'a> {
    pub(crate) program: &'a Program,
    rounds: Vec<Round>,
    /// Why the program does not run the model: no round follows.
    error: Option<String>,
}

impl<'a> Measured<'a> {
    pub(crate) fn new(program: &'a Program) -> Self {
        Self { program, rounds: Vec::new(), error: None }
    }

    /// # Errors
    /// exo-node's; that of a peer is noted.
    pub(crate) fn round(&mut self, model: &Path, work: Work) -> anyhow::Result<()> {
        if self.error.is_some() {
            return Ok(());
        }
        match self.program.round(model, work) {
            Ok(round) => self.rounds.push(round),
            Err(error) if self.program.is_own() => return Err(error),
            Err(error) => {
                eprintln!("{error:#}");
                self.error = Some(format!("{error:#}"));
            }
        }
        Ok(())
    }

    fn median(&self, of: fn(&Round) -> Option<f64>) -> Option<f64> {
        let mut values: Vec<f64> = self.rounds.iter().filter_map(of).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().filter(|_| self.error.is_none())
    }
}

/// The results of all programs on one model, exo-node's first.
pub(crate) struct ModelResult<'a> {
    name: String,
    file_bytes: u64,
    measured: Vec<Measured<'a>>,
}

impl<'a> ModelResult<'a> {
    pub(crate) fn new(model: &Path, measured: Vec<Measured<'a>>) -> anyhow::Result<Self> {
        let file_bytes = std::fs::metadata(model).with_context(|| model.display().to_string())?.len();
        let name = model.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self { name, file_bytes, measured })
    }

    fn write(&self, out: &mut String) {
        let prefill = |round: &Round| Some(round.prefill_tokens_per_s);
        let decode = |round: &Round| Some(round.decode_tokens_per_s);
        for (number, of) in self.measured.iter().enumerate() {
            let model = match number {
                0 => format!("{}, {:.0} MB", self.name, self.file_bytes as f64 / 1e6),
                _ => String::new(),
            };
            let cell = |speed: fn(&Round) -> Option<f64>| match of.median(speed) {
                Some(value) if of.program.is_own() => format!("{value:.1}"),
                Some(value) => format!("{value:.1} ({})", self.ratios(speed, value)),
                None => "does not run it".to_owned(),
            };
            let plain = |value: Option<f64>| value.map_or("?".to_owned(), |value| format!("{value:.0}"));
            let _ = writeln!(
                out,
                "| {model} | {} | {} | {} | {} | {} |",
                of.program.name(),
                cell(prefill),
                cell(decode),
                plain(of.median(|round| round.load_ms)),
                plain(of.median(|round| round.peak_memory_bytes.map(|bytes| bytes as f64 / 1e6))),
            );
        }
    }
}

impl ModelResult<'_> {
    /// The speeds of exo-node, with 16 and with 8 bits, as multiples of a peer's `value`.
    fn ratios(&self, speed: fn(&Round) -> Option<f64>, value: f64) -> String {
        let own = self.measured.iter().filter(|of| of.program.is_own()).filter_map(|of| of.median(speed));
        own.map(|own| format!("{:.2}×", own / value)).collect::<Vec<_>>().join(", ")
    }
}

pub(crate) fn text(repeat: usize, work: Work, programs: &[Program], results: &[ModelResult<'_>]) -> String {
    let Work { prompt_tokens, generate_tokens, threads } = work;
    let mut out = format!("Machine: {}.\nPrograms: ", machine());
    let versions = programs.iter().map(|program| match program.version() {
        Some(version) if version.starts_with(program.name()) => version,
        Some(version) => format!("{} {version}", program.name()),
        None => program.name().to_owned(),
    });
    let _ = writeln!(out, "{}.", versions.collect::<Vec<_>>().join(", "));
    let _ = writeln!(
        out,
        "Work on {threads} threads: a prompt of {prompt_tokens} tokens, then {generate_tokens} tokens after it; \
         medians of {repeat} rounds in turns."
    );
    out.push_str("In brackets: exo-node with 16 and with 8 bits, as multiples of the program.\n\n");
    out.push_str(
        "| model | program | prefill tokens/s | decode tokens/s | load ms | peak MB |\n|---|---|---|---|---|---|\n",
    );
    results.iter().for_each(|result| result.write(&mut out));
    out
}

/// The processor's name and its vector instructions, as Linux lists them.
fn machine() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = info.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name));
        line.and_then(|line| line.split_once(':')).map_or(String::new(), |(_, value)| value.trim().to_owned())
    };
    let flags = field("flags");
    let has = |flag: &str| flags.split(' ').any(|other| other == flag);
    let units = [("avx2", "AVX2"), ("avx512_vnni", "AVX-512 VNNI"), ("avx_vnni", "AVX-VNNI"), ("amx_int8", "AMX int8")];
    let units: Vec<&str> = units.into_iter().filter(|(flag, _)| has(flag)).map(|(_, name)| name).collect();
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let model = (field("model name"), field("model"));
    format!("{} (model {}), {cores} cores, {}", model.0, model.1, units.join(", "))
}

/// Replaces the part of a document between the mark of `part` and the next end.
pub(crate) fn replace(document: &Path, part: &str, report: &str) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(document).with_context(|| document.display().to_string())?;
    let (begin, end) = (format!("<!-- exo-benches {part} -->\n"), END);
    let parts = text.split_once(&begin).and_then(|(before, rest)| Some((before, rest.split_once(end)?.1)));
    let (before, behind) = parts.with_context(|| format!("{} has no `{}`", document.display(), begin.trim()))?;
    std::fs::write(document, format!("{before}{begin}{report}{end}{behind}"))?;
    Ok(())
}
