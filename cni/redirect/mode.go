package redirect

import (
	"errors"
	"fmt"

	"github.com/fairlead-mesh/fairlead/bpf"
)

// Mode is a way to redirect.
type Mode string

// The modes. Auto, which is only asked for, is eBPF where the kernel can do it.
const (
	Auto     Mode = "auto"
	EBPF     Mode = "ebpf"
	NFTables Mode = "nftables"
)

// ParseMode reads a mode as users write it.
func ParseMode(s string) (Mode, error) {
	switch m := Mode(s); m {
	case Auto, EBPF, NFTables:
		return m, nil
	}
	return "", fmt.Errorf("redirection %q: want %s, %s or %s", s, Auto, EBPF, NFTables)
}

// choose decides the mode of a node. why says what eBPF lacks, where it was not asked for not to be used.
func choose(cfg Config) (mode Mode, why error) {
	if cfg.Mode != Auto && cfg.Mode != "" {
		return cfg.Mode, nil
	}
	cgroup, err := cgroupOf(cfg)
	if err == nil {
		_, err = bpf.CgroupID(cgroup)
	}
	if err = errors.Join(err, bpf.Supported()); err != nil {
		return NFTables, err
	}
	return EBPF, nil
}
