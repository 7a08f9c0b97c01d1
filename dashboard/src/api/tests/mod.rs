//! The API of a node whose model answers by a script.

mod harmony;
mod scripted;
