//! Python's side of Jinja: how values print, their methods, tests and filters.
//!
//! Templates were tested with Python's Jinja only. minijinja has most of its behaviour; these modules have the rest.
//! Source: the documentation of Jinja 3.1 and of Python's built-in types.

mod arguments;
mod filters;
mod floats;
mod integers;
mod json;
mod methods;
mod tests_of_values;
mod text;
mod values;

use super::{Bounded, OUTPUT_BYTES_MAX};
use minijinja::Environment;
use text::print;
pub(super) use values::{from_fields, from_json};

/// Adds what minijinja lacks, or does in another way than Python.
pub(super) fn install(environment: &mut Environment<'static>) {
    environment.set_formatter(print);
    environment.set_unknown_method_callback(methods::call);
    environment.add_filter("tojson", json::to_json);
    tests_of_values::install(environment);
    filters::install(environment);
}
