//! `exo-node models`: lists the catalogue, and which of its models are on this machine.

use super::outcome::Outcome;
use crate::{CATALOGUE, Directories};
use clap::Args;
use exo_engines::model::families::FAMILIES;
use serde::Serialize;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  exo-node models
  exo-node models --families
  exo-node models --json | jq -r '.[] | select(.is_here) | .name'")]
pub(super) struct ModelsArguments {
    /// List the supported model families; their models run from any hub name or path
    #[arg(long)]
    families: bool,
    /// Print one JSON array on stdout
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    name: &'static str,
    about: &'static str,
    quantization: &'static str,
    is_here: bool,
}

pub(super) fn run(arguments: &ModelsArguments) -> anyhow::Result<Outcome> {
    if arguments.families {
        let names: Vec<&str> = FAMILIES.iter().map(|family| family.name).collect();
        match arguments.json {
            true => println!("{}", serde_json::to_string(&names)?),
            false => println!("{}", names.join("\n")),
        }
        return Ok(Outcome::Done);
    }
    let folders = Directories::from_environment()?.models;
    let reports: Vec<Report> = CATALOGUE
        .iter()
        .map(|entry| Report {
            name: entry.name,
            about: entry.about,
            quantization: entry.quantization,
            is_here: folders.iter().any(|folder| folder.join(entry.file).is_file()),
        })
        .collect();
    if arguments.json {
        println!("{}", serde_json::to_string(&reports)?);
        return Ok(Outcome::Done);
    }
    for report in reports {
        let here = if report.is_here { "here" } else { "" };
        println!("{:18} {:8} {:5} {}", report.name, report.quantization, here, report.about);
    }
    Ok(Outcome::Done)
}
