// Package runc (plumbing) stands in for runc on nodes that see only cgroup v2 while
// the controllers belong to v1: there runc would fail to write limits. It drops
// the limits from a container's configuration and hands on. Limits are then not
// enforced; all else is as on a current distribution.
package runc

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// Main behaves as runc does; it returns only on failure.
func Main(args []string) error {
	if slices.Contains(args, "update") {
		return nil // it sets limits, and nothing else
	}
	if bundle := bundleOf(args); bundle != "" {
		if err := rewrite(filepath.Join(bundle, "config.json")); err != nil {
			return fmt.Errorf("dropping limits: %w", err)
		}
	}
	real, err := exec.LookPath("runc")
	if err != nil {
		return err
	}
	return syscall.Exec(real, append([]string{"runc"}, args...), os.Environ())
}

// bundleOf is the bundle of a command that makes a container, or "".
func bundleOf(args []string) string {
	if !slices.Contains(args, "create") && !slices.Contains(args, "run") {
		return ""
	}
	for i, a := range args {
		if v, ok := strings.CutPrefix(a, "--bundle="); ok {
			return v
		}
		if (a == "--bundle" || a == "-b") && i+1 < len(args) {
			return args[i+1]
		}
	}
	return "."
}

func rewrite(path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if b, err = dropLimits(b); err != nil {
		return err
	}
	return os.WriteFile(path, b, 0o600)
}

// dropLimits removes what needs a controller; device rules stay.
func dropLimits(config []byte) ([]byte, error) {
	var c map[string]any
	if err := json.Unmarshal(config, &c); err != nil {
		return nil, err
	}
	if linux, ok := c["linux"].(map[string]any); ok {
		if r, ok := linux["resources"].(map[string]any); ok {
			for _, k := range []string{"cpu", "memory", "pids", "hugepageLimits", "blockIO", "unified"} {
				delete(r, k)
			}
		}
	}
	return json.Marshal(c)
}
