//! Reads the tokenizer from a GGUF file's metadata.
//!
//! Sources: `docs/gguf.md` of the ggml project for the keys; `llama-vocab.cpp` of llama.cpp for the pre-tokenizers by
//! name, and for the defaults of missing keys.

use super::pre_tokenizers::PreTokenizer;
use super::spm::{Spm, SpmTokenizer};
use super::templates::Templates;
use super::token_bytes::{Kind, Pieces, Spelling};
use super::{Affixes, Encoder, Tokenizer, ends};
use crate::format::{FormatError, Gguf, Value};
use std::collections::{BTreeSet, HashSet};
use std::mem::ManuallyDrop;
use std::path::Path;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::{NFC, Prepend, Replace};
use tokenizers::{AddedToken, NormalizerWrapper};

pub(super) fn open(path: &Path) -> Result<Tokenizer, FormatError> {
    let file = Gguf::open(path)?;
    let vocabulary = Vocabulary::read(&file)?;
    let reader = Reader { file: &file, vocabulary };
    match file.get("tokenizer.ggml.model", Value::as_text)? {
        Some("gpt2") => reader.byte_level(),
        Some("llama") => reader.sentence_piece(),
        Some(other) => Err(reader.bad(format!("the model `{other}` is not supported"))),
        None => Err(FormatError::NoTokenizer { path: path.to_owned() }),
    }
}

/// What becomes of whitespace behind a control token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum BlanksBehind {
    Kept,
    /// Phi-3's control tokens swallow it, but for [`KEEP_BLANKS`].
    Swallowed,
}

const KEEP_BLANKS: [&str; 3] = ["<unk>", "<s>", "<|endoftext|>"];

/// Texts and kinds of tokens, by id.
struct Vocabulary<'a> {
    texts: Vec<&'a str>,
    kinds: Vec<Kind>,
}

impl<'a> Vocabulary<'a> {
    fn read(file: &'a Gguf) -> Result<Self, FormatError> {
        let texts = file.list("tokenizer.ggml.tokens", Value::as_text)?;
        let Some(texts) = texts.filter(|texts| !texts.is_empty()) else {
            return Err(FormatError::NoTokenizer { path: file.file.path().to_owned() });
        };
        let types = file.list("tokenizer.ggml.token_type", Value::as_u64)?.unwrap_or_default();
        let kinds = (0..texts.len()).map(|id| match types.get(id) {
            Some(2 | 3) => Kind::Control,
            Some(4) => Kind::Verbatim,
            _ => Kind::Normal,
        });
        Ok(Self { kinds: kinds.collect(), texts })
    }

    fn tokens(&self) -> impl Iterator<Item = (u32, &'a str, Kind)> {
        self.texts.iter().zip(&self.kinds).enumerate().map(|(id, (&text, &kind))| (id as u32, text, kind))
    }

    /// Tokens that are cut out of a text before it is split.
    fn added(&self, blanks: BlanksBehind) -> Vec<AddedToken> {
        let special = self.tokens().filter(|(_, text, kind)| *kind != Kind::Normal && !text.is_empty());
        let token = |(_, text, kind): (u32, &str, Kind)| {
            let swallows = blanks == BlanksBehind::Swallowed && !KEEP_BLANKS.contains(&text);
            AddedToken::from(text, kind == Kind::Control).normalized(false).rstrip(swallows && kind == Kind::Control)
        };
        special.map(token).collect()
    }
}

struct Reader<'a> {
    file: &'a Gguf,
    vocabulary: Vocabulary<'a>,
}

impl Reader<'_> {
    fn bad(&self, what: impl ToString) -> FormatError {
        FormatError::BadTokenizer { path: self.file.file.path().to_owned(), what: what.to_string() }
    }

    fn id(&self, key: &str) -> Result<Option<u32>, FormatError> {
        let id = self.file.get(&format!("tokenizer.ggml.{key}"), Value::as_u64)?;
        let size = self.vocabulary.texts.len() as u64;
        match id {
            Some(id) if id >= size => Err(self.bad(format!("`{key}` is {id} in a vocabulary of {size}"))),
            id => Ok(id.map(|id| id as u32)),
        }
    }

    /// GGUF does not say which tokens swallow whitespace, so llama.cpp goes by the model's name.
    fn blanks_behind(&self) -> Result<BlanksBehind, FormatError> {
        let name = self.file.get("general.name", Value::as_text)?.unwrap_or_default().to_lowercase();
        let is_phi3 = name.contains("phi-3") || name.contains("phi3");
        Ok(if is_phi3 { BlanksBehind::Swallowed } else { BlanksBehind::Kept })
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool, FormatError> {
        Ok(self.file.get(&format!("tokenizer.ggml.{key}"), Value::as_bool)?.unwrap_or(default))
    }

    fn byte_level(self) -> Result<Tokenizer, FormatError> {
        let pre = self.file.get("tokenizer.ggml.pre", Value::as_text)?.unwrap_or("default");
        let rule = PreTokenizer::find(pre)
            .ok_or_else(|| self.bad(format!("the pre-tokenizer `{pre}` (`tokenizer.ggml.pre`) is not supported")))?;
        let vocab: Vocab = self.vocabulary.tokens().map(|(id, text, _)| (text.to_owned(), id)).collect();
        let merges = self.merges(&vocab)?;
        let bpe = BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(rule.ignores_merges);
        let mut tokenizer = tokenizers::Tokenizer::new(bpe.build().map_err(|e| self.bad(e))?);
        tokenizer.with_pre_tokenizer(Some(rule.build().map_err(|e| self.bad(e))?));
        if rule.composes {
            tokenizer.with_normalizer(Some(NFC)).map_err(|e| self.bad(e))?;
        }
        tokenizer.add_special_tokens(self.vocabulary.added(self.blanks_behind()?)).map_err(|e| self.bad(e))?;
        let affixes = self.affixes(rule.adds_bos)?;
        self.finish(Encoder::Affixed(Box::new(tokenizer), affixes), Spelling::ByteLevel)
    }

    /// The merges whose parts and result are tokens, without duplicates. Other merges can never apply, and the builder
    /// refuses them.
    fn merges(&self, vocab: &Vocab) -> Result<Merges, FormatError> {
        let lines = self.file.list("tokenizer.ggml.merges", Value::as_text)?;
        let lines = lines.ok_or_else(|| self.bad("`tokenizer.ggml.merges` is missing"))?;
        let mut seen = HashSet::new();
        let mut merges = Merges::with_capacity(lines.len());
        for line in lines {
            // A part may begin with a space but is never empty, so the separator is not the first character.
            let cut = line.char_indices().skip(1).find(|&(_, c)| c == ' ').map(|(at, _)| at);
            let Some((left, right)) = cut.map(|at| (&line[..at], &line[at + 1..])) else {
                continue;
            };
            let known = [left, right].iter().all(|part| vocab.contains_key(*part));
            if known && vocab.contains_key(&format!("{left}{right}")) && seen.insert((left, right)) {
                merges.push((left.to_owned(), right.to_owned()));
            }
        }
        Ok(merges)
    }

    fn sentence_piece(self) -> Result<Tokenizer, FormatError> {
        let scores = self.file.list("tokenizer.ggml.scores", |score| score.as_f64().map(|score| score as f32))?;
        let scores = scores.unwrap_or_default();
        let mut tokenizer = SpmTokenizer::new(Spm::new(&self.vocabulary.texts, scores, self.id("unknown_token_id")?));
        let mut steps: Vec<NormalizerWrapper> = Vec::new();
        if self.flag("add_space_prefix", true)? {
            steps.push(Prepend::new("▁".to_owned()).into());
        }
        steps.push(Replace::new(" ", "▁").map_err(|e| self.bad(e))?.into());
        let normalizer = tokenizers::normalizers::Sequence::new(steps);
        tokenizer.with_normalizer(Some(normalizer)).map_err(|e| self.bad(e))?;
        tokenizer.add_special_tokens(self.vocabulary.added(self.blanks_behind()?)).map_err(|e| self.bad(e))?;
        let affixes = self.affixes(true)?;
        self.finish(Encoder::Spm(Box::new(tokenizer), affixes), Spelling::SentencePiece)
    }

    fn affixes(&self, adds_bos: bool) -> Result<Affixes, FormatError> {
        let bos = self.id("bos_token_id")?.filter(|_| matches!(self.flag("add_bos_token", adds_bos), Ok(true)));
        let eos = self.id("eos_token_id")?.filter(|_| matches!(self.flag("add_eos_token", false), Ok(true)));
        Ok(Affixes { before: bos, after: eos })
    }

    fn finish(self, encoder: Encoder, spelling: Spelling) -> Result<Tokenizer, FormatError> {
        let (bos, eos) = (self.id("bos_token_id")?, self.id("eos_token_id")?);
        let mut named: BTreeSet<u32> = eos.into_iter().collect();
        named.extend(self.id("eot_token_id")?);
        named.extend(self.id("eom_token_id")?);
        let control = self.vocabulary.tokens().filter(|(_, _, kind)| *kind == Kind::Control);
        let ends = ends(named, control.map(|(id, text, _)| (id, text)));
        let text_of = |id: Option<u32>| id.and_then(|id| self.vocabulary.texts.get(id as usize)).copied();
        let default = self.file.get("tokenizer.chat_template", Value::as_text)?;
        let with_tools = self.file.get("tokenizer.chat_template.tool_use", Value::as_text)?;
        let templates = Templates::new(default, with_tools, (text_of(bos), text_of(eos)));
        let tokens = self.vocabulary.tokens().map(|(id, text, kind)| match kind {
            Kind::Control => (id, text, Kind::of_control(text, ends.contains(&id))),
            kind => (id, text, kind),
        });
        let pieces = Pieces::new(spelling, tokens);
        Ok(Tokenizer { encoder: ManuallyDrop::new(encoder), pieces, bos, ends, templates })
    }
}

#[cfg(test)]
mod tests;
