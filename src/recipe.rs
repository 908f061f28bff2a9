//! What is to be done to which module: a method, a number format, exceptions by name, and every
//! setting that may be turned. A recipe is whole and checked before any work begins.

use crate::importance::{ImportanceLoss, ImportanceSettings, TokenNorm};
use crate::plan::{ScaleDtype, Scheme};
use crate::solver::{Clip, SolverSettings};
use crate::statistics::StatisticsDtype;
use crate::tuning::TuningSettings;
use crate::{Error, Result};
use regex::Regex;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::str::FromStr;

/// How codes are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Round to nearest, without calibration.
    Rtn,
    /// Every token alike (arXiv:2210.17323).
    Gptq,
    /// Every token alike, corrected for the drift of the inputs (arXiv:2504.02692).
    Gptaq,
    /// Tokens weighted by their importance (arXiv:2508.03351, first version).
    VlmqV1,
    /// Tokens weighted by the square of their importance (second version).
    VlmqV2,
}

impl Method {
    /// All of them, from the simplest on.
    pub const ALL: [Self; 5] = [
        Self::Rtn,
        Self::Gptq,
        Self::Gptaq,
        Self::VlmqV1,
        Self::VlmqV2,
    ];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rtn => "rtn",
            Self::Gptq => "gptq",
            Self::Gptaq => "gptaq",
            Self::VlmqV1 => "vlmq-v1",
            Self::VlmqV2 => "vlmq-v2",
        }
    }

    fn importance(self) -> Option<ImportanceSettings> {
        let settings = |power| ImportanceSettings {
            power,
            norm: TokenNorm::MeanAbs,
            loss: ImportanceLoss::Attention,
        };
        match self {
            Self::Rtn | Self::Gptq | Self::Gptaq => None,
            Self::VlmqV1 => Some(settings(1.0)),
            Self::VlmqV2 => Some(settings(2.0)),
        }
    }

    /// GPTAQ's published α, except where the paper falls back to GPTQ: at 2 bits.
    fn alpha(self, bits: u8) -> f32 {
        match self {
            Self::Rtn | Self::Gptq => 0.0,
            Self::Gptaq => 0.25,
            Self::VlmqV1 | Self::VlmqV2 if bits <= 2 => 0.0,
            Self::VlmqV1 | Self::VlmqV2 => 0.25,
        }
    }
}

impl FromStr for Method {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        if name == "vlmq" {
            return Ok(Self::VlmqV1);
        }
        let known = Self::ALL.into_iter().find(|method| method.name() == name);
        known.ok_or_else(|| Error::Unsupported {
            what: format!("method {name:?}; rtn, gptq, gptaq, vlmq-v1 and vlmq-v2 are implemented"),
        })
    }
}

/// Modules whose name a pattern matches, and what becomes of them.
#[derive(Clone, Debug)]
struct Rule {
    pattern: Regex,
    /// `None` leaves the module as it is.
    scheme: Option<Scheme>,
}

/// Method, formats and settings of one run.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// How codes are found.
    pub method: Method,
    /// What the solver may be told; its α is decided per module by [`Recipe::alpha`].
    pub solver: SolverSettings,
    /// How tokens are weighted; `None` weighs them alike.
    pub importance: Option<ImportanceSettings>,
    /// What inputs are rounded to for the statistics.
    pub statistics_dtype: StatisticsDtype,
    /// How scales are tuned after the last layer, as set; see [`Recipe::tuning`].
    tuning: TuningSettings,
    scheme: Scheme,
    alpha: Option<f32>,
    rules: Vec<Rule>,
}

impl Recipe {
    /// The method's own settings and one number format for all modules.
    pub fn new(method: Method, scheme: Scheme) -> Self {
        Self {
            method,
            scheme,
            solver: SolverSettings::default(),
            importance: method.importance(),
            statistics_dtype: StatisticsDtype::default(),
            tuning: TuningSettings::default(),
            alpha: None,
            rules: Vec::new(),
        }
    }

    /// The number format of modules without a rule of their own.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// The number format of a module by its checkpoint name; `None` leaves it as it is. The first
    /// rule that matches decides.
    pub fn scheme_of(&self, module: &str) -> Option<Scheme> {
        let rule = self.rules.iter().find(|rule| rule.pattern.is_match(module));
        rule.map_or(Some(self.scheme), |rule| rule.scheme)
    }

    /// α for a module of this number format.
    pub fn alpha(&self, scheme: Scheme) -> f32 {
        self.alpha.unwrap_or(self.method.alpha(scheme.bits()))
    }

    /// How scales are tuned after the last layer, where they are.
    pub fn tuning(&self) -> Option<TuningSettings> {
        let is_on = self.tuning.steps > 0 && self.needs_calibration();
        is_on.then_some(self.tuning)
    }

    /// Whether samples are needed.
    pub fn needs_calibration(&self) -> bool {
        self.method != Method::Rtn
    }

    /// Whether the full-precision stream must be followed for any of `schemes`.
    pub fn needs_full_stream(&self, schemes: &[Scheme]) -> bool {
        let is_local = |i: ImportanceSettings| i.loss != ImportanceLoss::Answer;
        self.importance.is_some_and(is_local) || schemes.iter().any(|s| self.alpha(*s) != 0.0)
    }

    /// Turns one setting, as `--set key=value` does.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the allowed keys, or what is wrong with the value.
    pub fn set(&mut self, assignment: &str) -> Result<()> {
        let invalid = |why: String| Error::Invalid {
            what: format!("--set {assignment}"),
            why,
        };
        let (key, value) = assignment
            .split_once('=')
            .ok_or_else(|| invalid("key=value expected".into()))?;
        let number = |low: f64, high: f64| match value.parse::<f64>() {
            Ok(x) if x >= low && x <= high => Ok(x),
            _ => Err(invalid(format!("a number from {low} to {high} expected"))),
        };
        let word = |allowed: &str| invalid(format!("one of {allowed} expected"));
        match key {
            "dampening_frac" => self.solver.dampening_frac = number(0.0, 10.0)?,
            "col_block" => self.solver.col_block = number(1.0, 65536.0)? as usize,
            "alpha" => self.alpha = Some(number(0.0, 1.0)? as f32),
            "act_order" => {
                self.solver.act_order = value.parse().map_err(|_| word("true, false"))?;
            }
            "clip" => {
                self.solver.clip = match value {
                    "none" => Clip::None,
                    "mse" => Clip::Mse,
                    _ => return Err(word("none, mse")),
                }
            }
            "statistics_dtype" => {
                self.statistics_dtype = match value {
                    "f32" => StatisticsDtype::F32,
                    "bf16" => StatisticsDtype::Bf16,
                    _ => return Err(word("f32, bf16")),
                }
            }
            "importance_power" => self.importance_settings(&invalid)?.power = number(0.0, 8.0)?,
            "importance_norm" => {
                self.importance_settings(&invalid)?.norm = match value {
                    "mean_abs" => TokenNorm::MeanAbs,
                    "rms" => TokenNorm::Rms,
                    _ => return Err(word("mean_abs, rms")),
                }
            }
            "importance_loss" => {
                self.importance_settings(&invalid)?.loss = match value {
                    "attention" => ImportanceLoss::Attention,
                    "layer" => ImportanceLoss::Layer,
                    "answer" => ImportanceLoss::Answer,
                    _ => return Err(word("attention, layer, answer")),
                }
            }
            _ if self.tuning.set(key, value).map_err(invalid)? => {
                if !self.needs_calibration() {
                    return Err(invalid(format!("{} needs no samples", self.method.name())));
                }
            }
            _ => {
                let keys = "dampening_frac, col_block, alpha, act_order, clip, statistics_dtype, \
                            importance_power, importance_norm, importance_loss";
                let tuning = TuningSettings::KEYS;
                return Err(invalid(format!("unknown key; there are {keys}, {tuning}")));
            }
        }
        Ok(())
    }

    fn importance_settings(
        &mut self,
        invalid: &dyn Fn(String) -> Error,
    ) -> Result<&mut ImportanceSettings> {
        let why = format!("{} gives every token the same weight", self.method.name());
        self.importance.as_mut().ok_or_else(|| invalid(why))
    }

    /// Adds the rules of a recipe file:
    /// ```toml
    /// [[rule]]
    /// pattern = '\.mlp\.down_proj$'   # a regular expression, searched in the module's name
    /// bits = 4                        # what is absent is as in the rest of the model
    /// [[rule]]
    /// pattern = 'layers\.0\.'
    /// skip = true
    /// ```
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Format`] naming the rule.
    pub fn read_rules(&mut self, path: &Path) -> Result<()> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, "read", e))?;
        let file: RuleFile = toml::from_str(&text)
            .map_err(|e| Error::format(path, "recipe", e.message().to_owned()))?;
        for (i, row) in file.rule.iter().enumerate() {
            let rule = row.rule(self.scheme);
            self.rules
                .push(rule.map_err(|why| Error::format(path, format!("rule {i}"), why))?);
        }
        Ok(())
    }

    /// Patterns of the rules that match none of `modules`.
    pub fn idle_rules<'a>(&'a self, modules: &'a [String]) -> impl Iterator<Item = &'a str> {
        let idle = |rule: &&Rule| !modules.iter().any(|m| rule.pattern.is_match(m));
        self.rules
            .iter()
            .filter(idle)
            .map(|rule| rule.pattern.as_str())
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleFile {
    #[serde(default)]
    rule: Vec<RuleRow>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleRow {
    pattern: String,
    #[serde(default)]
    skip: bool,
    bits: Option<u8>,
    group_size: Option<i64>,
    symmetric: Option<bool>,
    scale_dtype: Option<ScaleDtype>,
}

impl RuleRow {
    fn rule(&self, rest: Scheme) -> std::result::Result<Rule, String> {
        let pattern = Regex::new(&self.pattern).map_err(|e| format!("pattern: {e}"))?;
        let group_size = match self.group_size {
            None => rest.group_size(),
            Some(-1) => None,
            Some(n) => Some(usize::try_from(n).map_err(|_| format!("group_size {n}"))?),
        };
        let scheme = Scheme::new(
            self.bits.unwrap_or(rest.bits()),
            group_size,
            self.symmetric.unwrap_or(rest.symmetric()),
            self.scale_dtype.unwrap_or(rest.scale_dtype()),
        );
        let scheme = scheme.map_err(|e| e.to_string())?;
        Ok(Rule {
            pattern,
            scheme: (!self.skip).then_some(scheme),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(method: Method, bits: u8) -> Recipe {
        let scheme = Scheme::new(bits, Some(64), false, ScaleDtype::Bf16).unwrap();
        Recipe::new(method, scheme)
    }

    #[test]
    fn presets_are_the_papers() {
        let v1 = recipe(Method::VlmqV1, 3);
        assert_eq!(v1.importance.unwrap().power, 1.0);
        assert_eq!(v1.alpha(v1.scheme()), 0.25);
        let v2 = recipe(Method::VlmqV2, 2);
        assert_eq!(v2.importance.unwrap().power, 2.0);
        assert_eq!(v2.alpha(v2.scheme()), 0.0);
        assert!(recipe(Method::Gptq, 4).importance.is_none());
        assert!(!recipe(Method::Rtn, 4).needs_calibration());
    }

    #[test]
    fn names_are_read_back() {
        for method in Method::ALL {
            assert_eq!(method.name().parse::<Method>().unwrap(), method);
        }
        assert!("awq2".parse::<Method>().is_err());
    }

    #[test]
    fn settings_are_checked() {
        let mut r = recipe(Method::VlmqV1, 3);
        for good in [
            "dampening_frac=0.05",
            "alpha=1",
            "act_order=false",
            "clip=mse",
            "col_block=64",
            "statistics_dtype=bf16",
            "importance_power=1.5",
            "importance_norm=rms",
            "importance_loss=layer",
            "importance_loss=answer",
            "tune_steps=100",
            "tune_batch=4",
            "tune_rate=0.01",
            "tune_loss=all",
            "tune_samples=512",
        ] {
            r.set(good).unwrap();
        }
        assert_eq!(r.alpha(r.scheme()), 1.0);
        assert_eq!(r.solver.dampening_frac, 0.05);
        for bad in [
            "alpha",
            "alpha=2",
            "alpha=nan",
            "clip=l2",
            "statistics_dtype=int8",
            "percdamp=0.1",
            "act_order=1",
            "tune_steps=-1",
            "tune_rate=0",
            "tune_loss=none",
            "tune_samples=1",
        ] {
            assert!(matches!(r.set(bad), Err(Error::Invalid { .. })), "{bad}");
        }
        assert!(recipe(Method::Gptq, 3).set("importance_power=2").is_err());
        assert_eq!(r.tuning().map(|t| (t.steps, t.batch)), Some((100, 4)));
        assert!(recipe(Method::Gptq, 3).tuning().is_none());
        assert!(recipe(Method::Rtn, 3).set("tune_steps=1").is_err());
    }

    #[test]
    fn the_first_matching_rule_decides() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("recipe.toml");
        let text = "[[rule]]\npattern = 'layers\\.0\\.'\nskip = true\n\
                    [[rule]]\npattern = 'down_proj$'\nbits = 4\ngroup_size = -1\n\
                    [[rule]]\npattern = 'nowhere'\nskip = true\n";
        std::fs::write(&path, text).unwrap();
        let mut r = recipe(Method::Gptq, 2);
        r.read_rules(&path).unwrap();
        assert_eq!(r.scheme_of("model.layers.0.mlp.down_proj"), None);
        let down = r.scheme_of("model.layers.1.mlp.down_proj").unwrap();
        assert_eq!((down.bits(), down.group_size()), (4, None));
        assert_eq!(r.scheme_of("model.layers.1.mlp.up_proj"), Some(r.scheme()));
        let modules = [
            "model.layers.0.a".to_owned(),
            "model.layers.1.mlp.down_proj".to_owned(),
        ];
        assert_eq!(r.idle_rules(&modules).collect::<Vec<_>>(), ["nowhere"]);
        for bad in [
            "[[rule]]\nbits = 3",
            "[[rule]]\npattern = '('",
            "[[rule]]\npattern = 'a'\nbits = 5",
        ] {
            std::fs::write(&path, bad).unwrap();
            assert!(
                matches!(r.read_rules(&path), Err(Error::Format { .. })),
                "{bad}"
            );
        }
    }
}
