//! The arguments of a filter: by position or by name, as Python takes them.

use super::text::string;
use minijinja::value::{Kwargs, Rest};
use minijinja::{Error, ErrorKind, Value};
use std::collections::BTreeMap;

/// Arguments by name.
#[derive(Debug)]
pub(super) struct Arguments(BTreeMap<&'static str, Value>);

impl Arguments {
    /// Names the given arguments: those by position have the names in this order.
    pub(super) fn new(given: Rest<Value>, named: Kwargs, names: &[&'static str]) -> Result<Self, Error> {
        if given.0.len() > names.len() {
            return Err(Error::from(ErrorKind::TooManyArguments));
        }
        let mut arguments: BTreeMap<&'static str, Value> = names.iter().copied().zip(given.0).collect();
        for name in names.iter().filter(|name| named.has(name)) {
            arguments.insert(name, named.get(name)?);
        }
        named.assert_all_used()?;
        Ok(Self(arguments))
    }

    /// An argument; `None` if it is missing.
    pub(super) fn remove(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name)
    }

    /// An argument; `None` if it is missing or none.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.remove(name).filter(|value| !value.is_none())
    }

    pub(super) fn flag(&mut self, name: &str) -> bool {
        self.take(name).is_some_and(|value| value.is_true())
    }

    pub(super) fn count(&mut self, name: &str) -> Result<Option<usize>, Error> {
        self.take(name).map(usize::try_from).transpose()
    }

    pub(super) fn text(&mut self, name: &str) -> Result<Option<String>, Error> {
        self.take(name).map(|value| string(&value)).transpose()
    }

    pub(super) fn needed_text(&mut self, name: &str) -> Result<String, Error> {
        self.text(name)?.ok_or_else(|| Error::new(ErrorKind::MissingArgument, format!("`{name}` is missing")))
    }

    /// The arguments for a filter of minijinja, which takes them by name.
    pub(super) fn into_kwargs(self) -> Kwargs {
        self.0.into_iter().filter(|(_, value)| !value.is_none()).collect()
    }
}
