//! Remedies for errors on the command line.
//!
//! The libraries' remedies name no flags, commands or variables, since embedders have none. This module adds them.

use crate::api::ServeError;
use crate::{ModelError, PlanError, RequestError, StartError};
use exo_actors::core::context::ContextLimit;
use exo_actors::core::scheduler::AdmitError;
use exo_engines::EngineError;
use exo_engines::format::FormatError;
use exo_net::{NetworkError, TokenError};

/// The remedy for an error, with the flags and commands that help; `None` where no remedy is known.
pub(super) fn hint(error: &anyhow::Error) -> Option<String> {
    if let Some(error) = error.downcast_ref::<RequestError>() {
        return Some(with_flags(error.remedy(), request_flags(error)));
    }
    if let Some(error) = error.downcast_ref::<EngineError>() {
        return Some(error.remedy().to_owned());
    }
    if let Some(error) = error.downcast_ref::<FormatError>() {
        return Some(error.remedy().to_owned());
    }
    match error.downcast_ref::<StartError>() {
        Some(StartError::Network(NetworkError::Family { .. })) => {
            return Some("`--listen [::]:52416` listens on both families".to_owned());
        }
        Some(StartError::Network(_)) => return Some("`--listen ADDR:PORT` chooses another address".to_owned()),
        _ => {}
    }
    if error.is::<TokenError>() {
        return Some("copy what `exo-node token` prints on a member: `--join -` reads it from stdin".to_owned());
    }
    match error.downcast_ref::<ServeError>()? {
        ServeError::NeedsKey { .. } => {
            Some("`--api-key-file FILE` sets the key; `--api 127.0.0.1:52415` needs no key".to_owned())
        }
        ServeError::BadKey => Some("choose another key for `--api-key` or `--api-key-file`".to_owned()),
        ServeError::Listen { address, .. } => {
            let holder = listeners::get_process_by_port(address.port(), listeners::Protocol::TCP).ok();
            let holder = holder.map(|process| format!("process {} ({}) has the port; ", process.pid, process.name));
            let flags = "`--api ADDR:PORT` chooses another address; `--api none` turns TCP off";
            Some(holder.unwrap_or_default() + flags)
        }
        ServeError::AlreadyRunning { .. } => {
            Some("`exo-node status` shows the running node; `--data-dir FOLDER` starts another one".to_owned())
        }
        ServeError::Socket { .. } => None,
    }
}

fn with_flags(remedy: &str, flags: Option<&str>) -> String {
    match flags {
        Some(flags) => format!("{remedy} ({flags})"),
        None => remedy.to_owned(),
    }
}

/// The flags, commands and variables that put an error's remedy into practice.
fn request_flags(error: &RequestError) -> Option<&'static str> {
    match error {
        RequestError::Model(error) => model_flags(error),
        RequestError::Plan(PlanError::DoesNotFit { .. }) => Some("--context N, --quantize q4_k, --kv-cache q8_0"),
        RequestError::Plan(PlanError::TooManyShards { .. }) => Some("--shards N"),
        RequestError::Plan(PlanError::BadSplit { .. }) => Some("--split laptop:0-11,desktop:12-29"),
        RequestError::Plan(PlanError::NoSuchNode { .. }) => Some("`exo-node status` lists the members"),
        RequestError::Plan(PlanError::NoDevice) | RequestError::NoDevice { .. } => {
            Some("leave --device out; `exo-node status` lists the devices")
        }
        RequestError::Admit(AdmitError::TooLong { context, .. })
            if matches!(context.limit, ContextLimit::Request | ContextLimit::LongRope) =>
        {
            Some("--context N")
        }
        RequestError::ContextTooLong { .. } => Some("--context N"),
        RequestError::BadDraft { .. } => Some("--draft MODEL"),
        RequestError::NotClustered => Some("leave `--listen none` out"),
        _ => None,
    }
}

fn model_flags(error: &ModelError) -> Option<&'static str> {
    match error {
        ModelError::Unknown { .. } => Some("`exo-node models` lists the names"),
        ModelError::NoSource { .. } | ModelError::Network { .. } => Some("HF_ENDPOINT, HF_TOKEN, EXO_MODELS_DIR"),
        ModelError::Forbidden { .. } | ModelError::NotOnHub { .. } => Some("HF_TOKEN"),
        ModelError::Disk { .. } | ModelError::DiskFull { .. } => Some("EXO_MODELS_DIR"),
        ModelError::NotGiven { otherwise, .. } => model_flags(otherwise),
        ModelError::Offline { .. } => Some("HF_HUB_OFFLINE"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The error and remedy that the user reads, for errors with and without flags.
    #[test]
    fn errors_name_the_flags_that_help() {
        let errors = [
            RequestError::Plan(PlanError::DoesNotFit { needed_bytes: 3, free_bytes: 2, missing_bytes: 1 }),
            RequestError::Plan(PlanError::BadSplit { layers: 30 }),
            RequestError::Plan(PlanError::NoSuchNode { node: "laptop".to_owned() }),
            RequestError::NoDevice { device: "gpu:7".to_owned() },
            RequestError::Model(ModelError::Unknown { model: "smolm2".to_owned() }),
            RequestError::Model(ModelError::Forbidden { url: "https://hub/a/b".to_owned() }),
            RequestError::MemoryBusy { model: "big".to_owned(), needed_bytes: 7 },
            RequestError::Overloaded { requests: 256 },
            RequestError::NotClustered,
        ];
        let lines = errors.map(|error| {
            let text = error.to_string();
            format!("error: {text}\n  remedy: {}", hint(&error.into()).unwrap_or_default())
        });
        insta::assert_snapshot!(lines.join("\n"));
    }
}
