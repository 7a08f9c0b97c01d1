//! `exo-node models`: lists the catalogue, and which of its models are on this machine.

use super::outcome::Outcome;
use crate::{CATALOGUE, Directories};
use clap::Args;
use exo_engines::model::families::FAMILIES;
use serde::Serialize;
use std::path::PathBuf;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  exo-node models
  exo-node models --verify
  exo-node models --families
  exo-node models --json | jq -r '.[] | select(.is_here) | .name'")]
pub(super) struct ModelsArguments {
    /// List the supported model families; their models run from any hub name or path
    #[arg(long)]
    families: bool,
    /// Read the catalogue's files on this machine, and compare their SHA-256 with the catalogue
    #[arg(long, conflicts_with_all = ["families", "json"])]
    verify: bool,
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
    if arguments.verify {
        return verify(&folders);
    }
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

/// Compares the files of catalogue models in the models folders with the catalogue.
fn verify(folders: &[PathBuf]) -> anyhow::Result<Outcome> {
    let mut wrong = 0;
    for entry in CATALOGUE {
        for path in folders.iter().map(|folder| folder.join(entry.file)).filter(|path| path.is_file()) {
            let verdict = match entry.is_file(&path)? {
                Some(true) => "as in the catalogue",
                Some(false) => {
                    wrong += 1;
                    "NOT as in the catalogue"
                }
                None => "its SHA-256 is not in the catalogue",
            };
            println!("{:18} {verdict}: {}", entry.name, path.display());
        }
    }
    match wrong {
        0 => Ok(Outcome::Done),
        _ => anyhow::bail!("{wrong} files are not the catalogue's: delete them, and fetch the models again"),
    }
}
