//! Secrets on the command line: the join token and the API key.
//!
//! Arguments can be read by all users of a machine, so a secret can also come from stdin, a file or a variable. No
//! message repeats a secret.

use anyhow::Context;
use std::convert::Infallible;
use std::io::BufRead;
use std::path::Path;
use std::str::FromStr;

/// The longest secret in a file or on stdin, in bytes.
const SECRET_BYTES_MAX: u64 = 4096;

/// An argument that is a secret, or `-` for the first line of stdin.
#[derive(Clone)]
pub(super) struct SecretArgument(String);

/// Any text is one, so that the parser of arguments has no error to print the text in.
impl FromStr for SecretArgument {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(Self(text.to_owned()))
    }
}

impl SecretArgument {
    /// Whether the secret is on stdin.
    pub(super) fn is_stdin(&self) -> bool {
        self.0 == "-"
    }
}

impl std::fmt::Debug for SecretArgument {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SecretArgument(…)")
    }
}

/// The secret in `file`, else the one of the argument, without the white space around it.
pub(super) fn read(argument: Option<&SecretArgument>, file: Option<&Path>) -> anyhow::Result<Option<String>> {
    use std::io::Read;
    if let Some(file) = file {
        let mut text = String::new();
        let opened = std::fs::File::open(file).and_then(|open| open.take(SECRET_BYTES_MAX).read_to_string(&mut text));
        opened.with_context(|| format!("cannot read {}", file.display()))?;
        return Ok(Some(text.trim().to_owned()));
    }
    match argument {
        Some(SecretArgument(text)) if text == "-" => {
            let mut line = String::new();
            let stdin = std::io::stdin().lock().take(SECRET_BYTES_MAX);
            std::io::BufReader::new(stdin).read_line(&mut line).context("cannot read stdin")?;
            Ok(Some(line.trim().to_owned()))
        }
        Some(SecretArgument(text)) => Ok(Some(text.trim().to_owned())),
        None => Ok(None),
    }
}
