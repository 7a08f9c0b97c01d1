//! config.json, in the layouts of transformers before and after version 5.

use super::rope::{self, RopeParameters, Scaling};
use crate::format::FormatError;
use crate::format::safetensors::read_text;
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// No real config is larger.
const CONFIG_BYTES_MAX: u64 = 4 << 20;

/// A JSON object with typed access. `null` counts as missing.
#[derive(Debug)]
pub(super) struct Config {
    path: PathBuf,
    fields: Map<String, Value>,
}

impl Config {
    pub(super) fn read(path: &Path) -> Result<Self, FormatError> {
        let text = read_text(path, CONFIG_BYTES_MAX)?;
        match serde_json::from_str(&text) {
            Ok(Value::Object(fields)) => Ok(Self { path: path.to_owned(), fields }),
            Ok(_) => Err(FormatError::Malformed { path: path.to_owned(), what: "it is not a JSON object".to_owned() }),
            Err(error) => {
                Err(FormatError::Malformed { path: path.to_owned(), what: format!("it is not JSON: {error}") })
            }
        }
    }

    /// The object at `key`, as a separate config.
    pub(super) fn nested(&self, key: &str) -> Option<Self> {
        match self.fields.get(key) {
            Some(Value::Object(fields)) => Some(Self { path: self.path.clone(), fields: fields.clone() }),
            _ => None,
        }
    }

    pub(super) fn bad(&self, key: &str, what: impl Into<String>) -> FormatError {
        FormatError::BadConfig { path: self.path.clone(), key: key.to_owned(), what: what.into() }
    }

    fn get<'a, T>(
        &'a self,
        key: &str,
        kind: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, FormatError> {
        match self.fields.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| self.bad(key, format!("is not {kind}"))),
        }
    }

    /// Whether the key is present with `null`, which some defaults distinguish from a missing key.
    pub(super) fn is_null(&self, key: &str) -> bool {
        matches!(self.fields.get(key), Some(Value::Null))
    }

    pub(super) fn count(&self, key: &str) -> Result<Option<usize>, FormatError> {
        self.get(key, "a count", |v| usize::try_from(v.as_u64()?).ok())
    }

    pub(super) fn counts(&self, key: &str) -> Result<Option<Vec<usize>>, FormatError> {
        let list = |value: &Value| value.as_array()?.iter().map(|v| usize::try_from(v.as_u64()?).ok()).collect();
        self.get(key, "a list of counts", list)
    }

    pub(super) fn required(&self, key: &str) -> Result<usize, FormatError> {
        self.count(key)?.ok_or_else(|| self.bad(key, "is missing"))
    }

    pub(super) fn float(&self, key: &str) -> Result<Option<f64>, FormatError> {
        self.get(key, "a number", Value::as_f64)
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, FormatError> {
        self.get(key, "true or false", Value::as_bool)
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&str>, FormatError> {
        self.get(key, "a string", Value::as_str)
    }

    pub(super) fn texts(&self, key: &str) -> Result<Option<Vec<&str>>, FormatError> {
        self.get(key, "a list of strings", |value| value.as_array()?.iter().map(Value::as_str).collect())
    }

    fn floats(&self, key: &str) -> Result<Vec<f32>, FormatError> {
        let list = |value: &Value| value.as_array()?.iter().map(|v| v.as_f64().map(|f| f as f32)).collect();
        self.get(key, "a list of numbers", list)?.ok_or_else(|| self.bad(key, "is missing"))
    }

    /// The rotary embedding of layers of `layer_type` (`full_attention` or `sliding_attention`).
    ///
    /// New layout: `rope_parameters`, flat or by layer type. Old layout: `rope_theta` and `rope_scaling`.
    pub(super) fn rope(
        &self,
        layer_type: &str,
        theta: f64,
        dimensions: usize,
        scales: ScalingUse,
    ) -> Result<RopeParameters, FormatError> {
        let section = self.rope_section(layer_type, scales);
        let own_theta = match &section {
            Some(section) => section.float("rope_theta")?,
            None => None,
        };
        let outer_theta = match scales {
            ScalingUse::Applies => self.float("rope_theta")?,
            ScalingUse::IsForOtherLayers => None,
        };
        let scaling = match &section {
            Some(section) => section.scaling(self)?,
            None => Scaling::None,
        };
        let part = match &section {
            Some(section) => section.float("partial_rotary_factor")?,
            None => None,
        };
        let part = part.or(self.float("partial_rotary_factor")?).unwrap_or(1.0);
        let dimensions = (dimensions as f64 * part.clamp(0.0, 1.0)) as usize;
        Ok(RopeParameters { theta: own_theta.or(outer_theta).unwrap_or(theta), dimensions, scaling })
    }

    /// The object that describes the rotary embedding of these layers. Where a config has both layouts, the old one's
    /// scaling counts, as it does for transformers: it replaces a flat section, and changes a section by layer type.
    fn rope_section(&self, layer_type: &str, scales: ScalingUse) -> Option<Self> {
        let new = self.nested("rope_parameters");
        let is_by_type = new.as_ref().is_some_and(|parameters| parameters.fields.values().any(Value::is_object));
        let by_type = new.as_ref().and_then(|parameters| parameters.nested(layer_type));
        if scales == ScalingUse::IsForOtherLayers {
            return by_type;
        }
        let old = self.nested("rope_scaling").filter(|scaling| !scaling.fields.is_empty());
        match (by_type, old) {
            (Some(mut section), Some(old)) => {
                section.fields.extend(old.fields);
                Some(section)
            }
            (None, Some(old)) => Some(old),
            (by_type, None) => by_type.or(new.filter(|_| !is_by_type)),
        }
    }

    /// LongRoPE, if the model has it: the context length above which the long divisors apply, and their scaling.
    pub(super) fn long_rope(&self) -> Result<Option<(usize, Scaling)>, FormatError> {
        let Some(section) = self.rope_section("full_attention", ScalingUse::Applies) else { return Ok(None) };
        if section.rope_type(self)? != "longrope" {
            return Ok(None);
        }
        let original = section.original_context(self)?;
        Ok(Some((original as usize, section.long_scaling(self, "long_factor")?)))
    }

    /// The kind of scaling. LongRoPE is called `su` in the first checkpoints of phi3, and `yarn` in some others.
    fn rope_type(&self, outer: &Self) -> Result<&str, FormatError> {
        let named = match self.text("rope_type")? {
            Some(kind) => kind,
            None => self.text("type")?.unwrap_or("default"),
        };
        match named {
            "su" => Ok("longrope"),
            "yarn" if outer.text("model_type")? == Some("phi3") => Ok("longrope"),
            named => Ok(named),
        }
    }

    fn long_scaling(&self, outer: &Self, key: &str) -> Result<Scaling, FormatError> {
        let original = self.original_context(outer)?;
        let factor = match self.float("factor")? {
            Some(factor) => factor,
            None => outer.required("max_position_embeddings")? as f64 / original,
        };
        let magnitude = self.float("attention_factor")?.unwrap_or(rope::long_magnitude(factor, original));
        Ok(Scaling::Divisors { divisors: self.floats(key)?, magnitude })
    }

    fn original_context(&self, outer: &Self) -> Result<f64, FormatError> {
        let key = "original_max_position_embeddings";
        match outer.float(key)?.or(self.float(key)?) {
            Some(context) if context >= 1.0 => Ok(context),
            Some(context) => Err(self.bad(key, format!("is {context}"))),
            None => Ok(outer.required("max_position_embeddings")? as f64),
        }
    }

    /// YaRN's factor of cos and sin; `None`: the default. DeepSeek's configs name it by two multipliers.
    fn yarn_magnitude(&self) -> Result<Option<f64>, FormatError> {
        if let Some(factor) = self.float("attention_factor")? {
            return Ok(Some(factor));
        }
        let multiplier = |key: &str| Ok::<_, FormatError>(self.float(key)?.filter(|&multiplier| multiplier != 0.0));
        let (Some(part), Some(all)) = (multiplier("mscale")?, multiplier("mscale_all_dim")?) else { return Ok(None) };
        let stretched = libm::log(self.float("factor")?.unwrap_or(1.0).max(1.0));
        let magnitude = |multiplier: f64| 0.1 * multiplier * stretched + 1.0;
        Ok(Some(magnitude(part) / magnitude(all)))
    }

    fn scaling(&self, outer: &Self) -> Result<Scaling, FormatError> {
        let factor = || self.float("factor")?.ok_or_else(|| self.bad("factor", "is missing"));
        let original = || self.original_context(outer);
        match self.rope_type(outer)? {
            "default" => Ok(Scaling::None),
            "longrope" => self.long_scaling(outer, "short_factor"),
            "linear" => Ok(Scaling::Linear { factor: factor()? }),
            "llama3" => Ok(Scaling::Llama3 {
                factor: factor()?,
                low_frequency_factor: self.float("low_freq_factor")?.unwrap_or(1.0),
                high_frequency_factor: self.float("high_freq_factor")?.unwrap_or(4.0),
                original_context: original()?,
            }),
            "yarn" => Ok(Scaling::Yarn {
                factor: factor()?,
                beta_fast: self.float("beta_fast")?.unwrap_or(32.0),
                beta_slow: self.float("beta_slow")?.unwrap_or(1.0),
                original_context: original()?,
                truncate: self.flag("truncate")?.unwrap_or(true),
                attention_factor: self.yarn_magnitude()?,
            }),
            // Up to the context of the config, which no request exceeds, transformers scales nothing.
            "dynamic" => Ok(Scaling::None),
            other => Err(self.bad("rope_type", format!("is `{other}`, which is not supported"))),
        }
    }
}

/// Whether the model's scaling and its `rope_theta` apply to these layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ScalingUse {
    Applies,
    IsForOtherLayers,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Configs with both layouts, or with parts of them: what transformers 5.24 makes of each.
    #[test]
    fn mixed_layouts_mean_what_transformers_takes_them_for() {
        let linear = |factor: f64| json!({"rope_type": "linear", "factor": factor});
        let by_type = json!({
            "full_attention": {"rope_type": "default", "rope_theta": 3e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 4e4},
        });
        let full_only = json!({"full_attention": {"rope_type": "linear", "factor": 2.0}});
        // The config, and theta and factor of layers with full attention and of sliding ones.
        let cases = [
            (json!({"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}), (2e4, 1.0), (7.0, 1.0)),
            (json!({"rope_theta": 5e4, "rope_scaling": linear(8.0)}), (5e4, 8.0), (7.0, 1.0)),
            (
                json!({"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}, "rope_scaling": linear(8.0)}),
                (1e4, 8.0),
                (7.0, 1.0),
            ),
            (json!({"rope_parameters": by_type, "rope_theta": 5e4}), (3e4, 1.0), (4e4, 1.0)),
            (json!({"rope_parameters": by_type, "rope_scaling": linear(8.0)}), (3e4, 8.0), (4e4, 1.0)),
            (json!({"rope_parameters": full_only, "rope_theta": 5e4}), (5e4, 2.0), (7.0, 1.0)),
            (json!({"rope_parameters": full_only, "rope_scaling": {}}), (1e4, 2.0), (7.0, 1.0)),
        ];
        for (config, full, sliding) in cases {
            let Value::Object(fields) = config.clone() else { unreachable!("an object") };
            let config_file = Config { path: PathBuf::new(), fields };
            let read = |layer_type, theta, scales| {
                let RopeParameters { theta, scaling, .. } =
                    config_file.rope(layer_type, theta, 64, scales).expect("a sound config");
                match scaling {
                    Scaling::Linear { factor } => (theta, factor),
                    _ => (theta, 1.0),
                }
            };
            let got = read("full_attention", 1e4, ScalingUse::Applies);
            assert_eq!(got, full, "{config}");
            let got = read("sliding_attention", 7.0, ScalingUse::IsForOtherLayers);
            assert_eq!(got, sliding, "{config}");
        }
    }

    /// Phi 3's LongRoPE under its older names.
    #[test]
    fn the_older_names_of_long_rope() {
        let config = |model_type: &str, kind: &str| {
            let scaling = json!({
                "type": kind, "factor": 2.0, "short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0],
            });
            let config = json!({"model_type": model_type, "max_position_embeddings": 8192,
                "original_max_position_embeddings": 4096, "rope_scaling": scaling});
            let Value::Object(fields) = config else { unreachable!("an object") };
            Config { path: PathBuf::new(), fields }.long_rope().expect("a sound config").map(|(above, _)| above)
        };
        assert_eq!(["longrope", "su", "yarn"].map(|kind| config("phi3", kind)), [Some(4096); 3]);
        assert_eq!(config("qwen2", "yarn"), None);
    }
}
