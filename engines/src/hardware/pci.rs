//! PCI addresses and the numbers of vendors and products.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Where a device is plugged in: domain, bus, device, function, as in `0000:03:00.0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PciAddress {
    /// The domain, which some virtual machines number beyond 16 bits.
    pub domain: u32,
    /// The bus.
    pub bus: u8,
    /// The device on its bus, below 32.
    pub device: u8,
    /// The function of the device, below 8.
    pub function: u8,
}

/// A text is not a PCI address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a PCI address such as 0000:03:00.0")]
pub struct NotAPciAddress(String);

impl FromStr for PciAddress {
    type Err = NotAPciAddress;

    fn from_str(text: &str) -> Result<Self, NotAPciAddress> {
        let parse = || {
            let (domain, rest) = text.split_once(':')?;
            let (bus, rest) = rest.split_once(':')?;
            let (device, function) = rest.split_once('.')?;
            let byte = |text: &str, below: u8| u8::from_str_radix(text, 16).ok().filter(|&value| value < below);
            Some(Self {
                domain: u32::from_str_radix(domain, 16).ok()?,
                bus: u8::from_str_radix(bus, 16).ok()?,
                device: byte(device, 32)?,
                function: byte(function, 8)?,
            })
        };
        parse().ok_or_else(|| NotAPciAddress(text.to_owned()))
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { domain, bus, device, function } = self;
        write!(f, "{domain:04x}:{bus:02x}:{device:02x}.{function}")
    }
}

impl TryFrom<String> for PciAddress {
    type Error = NotAPciAddress;

    fn try_from(text: String) -> Result<Self, NotAPciAddress> {
        text.parse()
    }
}

impl From<PciAddress> for String {
    fn from(address: PciAddress) -> Self {
        address.to_string()
    }
}

/// The numbers of vendor and product, as `/usr/share/misc/pci.ids` lists them: `8086:e20b`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PciId {
    /// The vendor's number.
    pub vendor: u16,
    /// The product's number.
    pub product: u16,
}

impl PciId {
    /// Intel.
    pub const INTEL: u16 = 0x8086;
    /// NVIDIA.
    pub const NVIDIA: u16 = 0x10de;
    /// AMD.
    pub const AMD: u16 = 0x1002;

    /// The vendor's name, or its number.
    pub fn vendor_name(self) -> String {
        match self.vendor {
            Self::INTEL => "Intel".to_owned(),
            Self::NVIDIA => "NVIDIA".to_owned(),
            Self::AMD => "AMD".to_owned(),
            other => format!("vendor {other:04x}"),
        }
    }
}

/// A text is not the number of a product.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a PCI id such as 8086:e20b")]
pub struct NotAPciId(String);

impl TryFrom<String> for PciId {
    type Error = NotAPciId;

    fn try_from(text: String) -> Result<Self, NotAPciId> {
        let half = |text: &str| u16::from_str_radix(text, 16).ok();
        let parsed = text.split_once(':').and_then(|(vendor, product)| Some((half(vendor)?, half(product)?)));
        parsed.map(|(vendor, product)| Self { vendor, product }).ok_or(NotAPciId(text))
    }
}

impl From<PciId> for String {
    fn from(id: PciId) -> Self {
        id.to_string()
    }
}

impl fmt::Display for PciId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:04x}", self.vendor, self.product)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn addresses_are_written_as_the_kernel_does() {
        for text in ["0000:03:00.0", "0000:00:02.0", "10000:e1:1f.7"] {
            assert_eq!(text.parse::<PciAddress>().map(|address| address.to_string()), Ok(text.to_owned()));
        }
        for text in ["", "03:00.0", "0000:03:20.0", "0000:03:00.8", "0000:03:00", "card0", "x:y:z.0"] {
            assert!(text.parse::<PciAddress>().is_err(), "{text}");
        }
    }

    #[test]
    fn products_are_written_as_in_the_list_of_ids() {
        let id = PciId { vendor: 0x8086, product: 0xb };
        assert_eq!((id.to_string().as_str(), PciId::try_from(id.to_string())), ("8086:000b", Ok(id)));
        assert!(PciId::try_from("8086".to_owned()).is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_an_address_or_an_error(text in ".*") {
            if let Ok(address) = text.parse::<PciAddress>() {
                prop_assert_eq!(address.to_string().parse(), Ok(address));
            }
        }
    }
}
