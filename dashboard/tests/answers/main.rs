//! The API of a node whose model answers by a script: how answers in different formats reach clients.

#![allow(clippy::expect_used)] // A test that cannot continue panics with the reason.

mod harmony;
mod scripted;
