//! The pre-tokenizers of GGUF vocabularies, by the name in `tokenizer.ggml.pre`.
//!
//! Source: `llama-vocab.cpp` of llama.cpp for the names and flags. The patterns are those of the models' own
//! tokenizer.json: llama.cpp's differ in places (combining marks, letters outside ASCII).

use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::punctuation::Punctuation;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{PreTokenizerWrapper, SplitDelimiterBehavior};

/// Llama 3's pattern. Qwen's pattern differs in that each digit is a piece.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 3.5 counts combining marks as letters.
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";
/// GPT-4o splits words where a lower-case letter meets an upper-case one.
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Mistral's Tekken: as GPT-4o, with single digits and without contractions.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const MINICPM5: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const SEED_CODER: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";
const EXAONE_MOE: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+";
const BAILING: &str =
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
/// Jais 2: Llama 3's pattern, with runs of spaces in powers of two.
const JAIS2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}";
/// The letters of DeepSeek LLM: alphabets with two cases.
const DEEPSEEK_LETTERS: &str = "\\s?[A-Za-z\u{b5}\u{c0}-\u{d6}\u{d8}-\u{f6}\u{f8}-\u{1ba}\u{1bc}-\u{1bf}\u{1c4}-\u{293}\u{295}-\u{2af}\
    \u{370}-\u{373}\u{376}\u{377}\u{37b}-\u{37d}\u{37f}\u{386}\u{388}-\u{38a}\u{38c}\u{38e}-\u{3a1}\u{3a3}-\
    \u{3f5}\u{3f7}-\u{481}\u{48a}-\u{52f}\u{531}-\u{556}\u{10a0}-\u{10c5}\u{13a0}-\u{13f5}\u{13f8}-\u{13fd}\
    \u{1c90}-\u{1cba}\u{1cbd}-\u{1cbf}\u{1d00}-\u{1d2b}\u{1d6b}-\u{1d77}\u{1d79}-\u{1d9a}\u{1e00}-\u{1f15}\
    \u{1f18}-\u{1f1d}\u{1f20}-\u{1f45}\u{1f48}-\u{1f4d}\u{1f50}-\u{1f57}\u{1f59}\u{1f5b}\u{1f5d}\u{1f5f}-\
    \u{1f7d}\u{1f80}-\u{1fb4}\u{1fb6}-\u{1fbc}\u{1fbe}\u{1fc2}-\u{1fc4}\u{1fc6}-\u{1fcc}\u{1fd0}-\u{1fd3}\
    \u{1fd6}-\u{1fdb}\u{1fe0}-\u{1fec}\u{1ff2}-\u{1ff4}\u{1ff6}-\u{1ffc}\u{2102}\u{2107}\u{210a}-\u{2113}\
    \u{2115}\u{2119}-\u{211d}\u{2124}\u{2126}\u{2128}\u{212a}-\u{212d}\u{212f}-\u{2134}\u{2139}\u{213c}-\
    \u{213f}\u{2145}-\u{2149}\u{214e}\u{2183}\u{2184}\u{2c00}-\u{2c7b}\u{2c7e}-\u{2ce4}\u{2ceb}-\u{2cee}\
    \u{2cf2}\u{2cf3}\u{a640}-\u{a66d}\u{a680}-\u{a69b}\u{a722}-\u{a76f}\u{a771}-\u{a787}\u{a78b}-\u{a78e}\
    \u{ab70}-\u{abbf}\u{fb00}-\u{fb06}\u{fb13}-\u{fb17}\u{ff21}-\u{ff3a}\u{ff41}-\u{ff5a}\u{10400}-\u{1044f}\
    \u{104b0}-\u{104d3}\u{104d8}-\u{104fb}\u{10c80}-\u{10cb2}\u{10cc0}-\u{10cf2}\u{118a0}-\u{118df}\u{1e900}\
    -\u{1e943}]+";
const DEEPSEEK_PUNCTUATION: &str = "\\s?[!-/:-~\u{ff01}-\u{ff0f}\u{ff1a}-\u{ff5e}\u{2018}-\u{201f}\u{3000}-\u{3002}]+";
const DEEPSEEK_IDEOGRAPHS: &str = "[\u{4e00}-\u{9fa5}\u{800}-\u{4e00}\u{ac00}-\u{d7ff}]+";
const DEEPSEEK3_IDEOGRAPHS: &str = "[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+";
const DEEPSEEK3: &str = "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P\
    }\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+";
const VIKING: &str = " ?[^(\\s|[.,!?\u{2026}\u{3002}\u{ff0c}\u{3001}\u{964}\u{6d4}\u{60c}])]+";

/// A step of a pre-tokenizer. Each step cuts the pieces of the step before.
#[derive(Debug, Clone, Copy)]
enum Step {
    /// The matches of a pattern are pieces, and so is the text between them.
    Pattern(&'static str),
    EachDigit,
    DigitRuns,
    PunctuationRuns,
    /// GPT-2's pattern, and its spelling of bytes.
    Gpt2Words,
    /// GPT-2's spelling of bytes.
    Bytes,
}
use Step::{Bytes, DigitRuns, EachDigit, Gpt2Words, Pattern, PunctuationRuns};

/// The pre-tokenizer of one or more names.
#[derive(Debug, Clone, Copy)]
pub(super) struct PreTokenizer {
    names: &'static [&'static str],
    steps: &'static [Step],
    /// Whether a piece that is a token is taken whole, without merges.
    pub(super) ignores_merges: bool,
    /// Whether a text begins with BOS where the file does not say.
    pub(super) adds_bos: bool,
    /// Whether the model's own tokenizer composes characters (NFC) first.
    pub(super) composes: bool,
}

const fn rule(names: &'static [&'static str], steps: &'static [Step]) -> PreTokenizer {
    PreTokenizer { names, steps, ignores_merges: false, adds_bos: false, composes: false }
}

const RULES: [PreTokenizer; 24] = [
    PreTokenizer {
        ignores_merges: true,
        adds_bos: true,
        ..rule(
            &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"],
            &[Pattern(LLAMA3), Bytes],
        )
    },
    PreTokenizer { ignores_merges: true, ..rule(&["glm4", "glm5"], &[Pattern(LLAMA3), Bytes]) },
    rule(&["dbrx", "smaug-bpe", "chatglm-bpe"], &[Pattern(LLAMA3), Bytes]),
    PreTokenizer { composes: true, ..rule(&["qwen2"], &[Pattern(QWEN2), Bytes]) },
    rule(
        &["deepseek-r1-qwen", "stablelm2", "megrez", "kormo", "f2llmv2", "hunyuan", "solar-open", "grok-2"],
        &[Pattern(QWEN2), Bytes],
    ),
    rule(&["qwen35"], &[Pattern(QWEN35), Bytes]),
    rule(
        &[
            "gpt-2",
            "phi-2",
            "a.x-4.0",
            "mellum",
            "gigachat",
            "trillion",
            "exaone4",
            "jais",
            "modern-bert",
            "jina-es",
            "jina-de",
            "jina-v2-es",
            "jina-v2-de",
            "granite-docling",
        ],
        &[Gpt2Words],
    ),
    PreTokenizer { composes: true, ..rule(&["mpt", "olmo"], &[Gpt2Words]) },
    rule(&["smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b", "mellum2"], &[EachDigit, Gpt2Words]),
    PreTokenizer { composes: true, ..rule(&["command-r"], &[EachDigit, Gpt2Words]) },
    rule(&["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"], &[Pattern(GPT4O), Bytes]),
    PreTokenizer { ignores_merges: true, adds_bos: true, ..rule(&["tekken"], &[Pattern(TEKKEN), Bytes]) },
    PreTokenizer { ignores_merges: true, ..rule(&["minicpm5"], &[Pattern(r"\p{N}{1,3}"), Pattern(MINICPM5), Bytes]) },
    rule(
        &["deepseek-llm"],
        &[
            Pattern("[\r\n]"),
            Pattern(DEEPSEEK_LETTERS),
            Pattern(DEEPSEEK_PUNCTUATION),
            Pattern(r"\s+$"),
            Pattern(DEEPSEEK_IDEOGRAPHS),
            EachDigit,
            Bytes,
        ],
    ),
    rule(
        &["deepseek-coder"],
        &[
            Pattern("[\r\n]"),
            Pattern(r"\s?\p{L}+"),
            Pattern(r"\s?\p{P}+"),
            Pattern(DEEPSEEK_IDEOGRAPHS),
            EachDigit,
            Bytes,
        ],
    ),
    rule(
        &["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"],
        &[Pattern(r"\p{N}{1,3}"), Pattern(DEEPSEEK3_IDEOGRAPHS), Pattern(DEEPSEEK3), Bytes],
    ),
    rule(&["seed-coder"], &[Pattern(SEED_CODER), Bytes]),
    rule(&["exaone-moe"], &[Pattern(EXAONE_MOE), Bytes]),
    rule(&["bailingmoe", "bailingmoe2", "llada-moe"], &[Pattern(BAILING), Bytes]),
    rule(&["superbpe"], &[Pattern(r"\p{N}+"), Pattern(r"(?=(\d{3})+(?!\d))"), Bytes]),
    rule(&["viking"], &[Pattern(VIKING), EachDigit, Bytes]),
    rule(&["jais-2"], &[Pattern(JAIS2), Bytes]),
    rule(&["falcon"], &[PunctuationRuns, Gpt2Words, DigitRuns, Pattern("[0-9][0-9][0-9]")]),
    // llama.cpp's own, for files without a name.
    rule(
        &["default"],
        &[Pattern(r"[\p{P}\$\+<=>\^~\|]+"), Pattern(GPT2), Pattern(r"\p{N}+"), Pattern("[0-9][0-9][0-9]"), Bytes],
    ),
];

impl PreTokenizer {
    /// The rule of the name in `tokenizer.ggml.pre`.
    pub(super) fn find(name: &str) -> Option<&'static Self> {
        RULES.iter().find(|rule| rule.names.contains(&name))
    }

    /// The pre-tokenizer of the `tokenizers` crate.
    ///
    /// # Errors
    /// A pattern that the crate's regex engine does not compile.
    pub(super) fn build(&self) -> tokenizers::Result<PreTokenizerWrapper> {
        let step = |step: &Step| -> tokenizers::Result<PreTokenizerWrapper> {
            Ok(match step {
                Pattern(pattern) => {
                    let pattern = SplitPattern::Regex((*pattern).to_owned());
                    Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?.into()
                }
                EachDigit => Digits::new(true).into(),
                DigitRuns => Digits::new(false).into(),
                PunctuationRuns => Punctuation::new(SplitDelimiterBehavior::Contiguous).into(),
                Gpt2Words => ByteLevel::new(false, true, true).into(),
                Bytes => ByteLevel::new(false, true, false).into(),
            })
        };
        Ok(Sequence::new(self.steps.iter().map(step).collect::<Result<_, _>>()?).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use std::path::Path;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _};

    /// A pre-tokenizer as the tokenizer.json of its models has it, and llama.cpp's flags.
    #[derive(Deserialize)]
    struct Original {
        names: Vec<String>,
        pre_tokenizer: serde_json::Value,
        ignore_merges: bool,
        add_bos: bool,
    }

    /// What the patterns tell apart: digits, contractions, cases, marks, scripts, blanks, line ends, punctuation.
    const TEXTS: [&str; 40] = [
        "Hello  world",
        "   leading",
        "trailing   ",
        "a\tb\t\tc",
        "line\n\nnext",
        "a \n b",
        "a\r\nb\r\n\r\nc",
        " \n \n\n \t\n",
        "  ",
        "1",
        "1234",
        "12345678901",
        "1,234,567.89",
        "v1.2.3 2024-01-31",
        "x1y22z333",
        "\u{661}\u{662}\u{663}\u{664}",
        "\u{ff11}\u{ff12}\u{ff13}",
        "\u{2163}\u{b2}\u{bd}",
        "I'm you're he's I'll she'd don't",
        "I'M YOU'RE HE'S WE'VE",
        "'s 'sa",
        "CamelCaseString HTTPServerError",
        "getHTTPResponse2xx",
        "\u{e9}Ab \u{c9}cole\u{c0}B",
        "iPhone's McDonald'S",
        "def f(x):\n    return x+1\n\n\nclass A:\n\t\tpass",
        "    if (a && b) { c->d(); }\n        // x\n",
        "a+=b==c!=d<=e>=f",
        "!!! ??? ...\n\n",
        "foo/bar//baz\n/x",
        "$100 \u{a3}5 +1 <tag> a|b a^b `x`",
        "snake_case __init__",
        "\u{4e2d}\u{6587}\u{ff0c}\u{6807}\u{70b9}\u{3002}English\u{6df7}\u{5408}123",
        "\u{65e5}\u{672c}\u{8a9e}\u{306e}\u{30c6}\u{30ad}",
        "\u{d55c}\u{ad6d}\u{c5b4} \u{d14d}\u{c2a4}\u{d2b8}",
        "\u{939}\u{93f}\u{928}\u{94d}\u{926}\u{940}",
        "e\u{301}cole A\u{30a}B",
        "\u{1f44d}\u{1f3fd} \u{1f468}\u{200d}\u{1f469}",
        "nbsp\u{a0}between \u{a0} two",
        "\u{1c5} \u{2b0}x \u{aa}",
    ];

    fn splits(pre_tokenizer: &PreTokenizerWrapper, text: &str) -> Vec<(usize, usize)> {
        let mut pieces = PreTokenizedString::from(text);
        pre_tokenizer.pre_tokenize(&mut pieces).expect("a text");
        let pieces = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
        pieces.into_iter().map(|(_, offsets, _)| offsets).collect()
    }

    /// R4.1: each name splits as the tokenizer.json of its models does.
    #[test]
    fn each_name_splits_as_its_models_own_pre_tokenizer() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pre_tokenizers/originals.json");
        let originals: Vec<Original> = serde_json::from_slice(&std::fs::read(path).expect("the list")).expect("a list");
        let mut known = 0;
        for original in originals {
            let theirs: PreTokenizerWrapper = serde_json::from_value(original.pre_tokenizer).expect("a pre-tokenizer");
            for name in &original.names {
                let rule = PreTokenizer::find(name).unwrap_or_else(|| panic!("{name} is not known"));
                let ours = rule.build().expect("its patterns compile");
                for text in TEXTS {
                    assert_eq!(splits(&ours, text), splits(&theirs, text), "{name} on {text:?}");
                }
                assert_eq!((rule.ignores_merges, rule.adds_bos), (original.ignore_merges, original.add_bos), "{name}");
                known += 1;
            }
        }
        assert_eq!(known, RULES.iter().map(|rule| rule.names.len()).sum::<usize>());
    }
}
