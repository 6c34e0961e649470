package lab

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/bpf"
	"github.com/fairlead-mesh/fairlead/cni/redirect"
	"github.com/fairlead-mesh/fairlead/internal/netns"
)

// Excludes tells whether the kernel leaves out of a pod's redirection what goes to a port, in and out, and no other port.
func (n *Node) Excludes(p *Pod, port uint16) (bool, error) {
	if n.world.opts.Redirection == string(redirect.NFTables) {
		var found bool
		err := p.Do(func() (err error) {
			found, err = chainsExclude(port)
			return err
		})
		return found, err
	}
	var cookie uint64
	err := p.Do(func() (err error) {
		cookie, err = netns.Cookie(nil)
		return err
	})
	if err != nil {
		return false, err
	}
	var found bool
	err = n.thread.do(func() (err error) {
		found, err = mapExcludes(cookie, uint32(port))
		return err
	})
	return found, err
}

// exclusionKey is struct exclusion_key of bpf/redirect.h.
type exclusionKey struct {
	Netns        uint64
	Kind, Number uint32
}

// mapExcludes looks at the entries of a network namespace. The agent removes former ones last, when the new are in force.
func mapExcludes(cookie uint64, port uint32) (bool, error) {
	m, err := ebpf.LoadPinnedMap(filepath.Join(bpf.DefaultDir, "maps", "exclusions"), &ebpf.LoadPinOptions{ReadOnly: true})
	if err != nil {
		return false, fmt.Errorf("open the map of exclusions: %w", err)
	}
	defer m.Close()
	var key exclusionKey
	var value uint32
	kinds, others := map[uint32]bool{}, false
	entries := m.Iterate()
	for entries.Next(&key, &value) {
		if key.Netns != cookie {
			continue
		}
		kinds[key.Kind] = true
		others = others || key.Number != port
	}
	if err := entries.Err(); errors.Is(err, ebpf.ErrIterationAborted) { // it is being changed
		return false, nil
	} else if err != nil {
		return false, fmt.Errorf("list exclusions: %w", err)
	}
	return len(kinds) == 2 && !others, nil
}

// chainsExclude looks at the chains of the calling thread's network namespace, which are always exchanged as a whole.
func chainsExclude(port uint16) (bool, error) {
	conn, err := nftables.New()
	if err != nil {
		return false, err
	}
	table := &nftables.Table{Family: nftables.TableFamilyINet, Name: redirect.TableName}
	for _, name := range []string{"in", "out"} {
		rules, err := conn.GetRules(table, &nftables.Chain{Name: name, Table: table})
		if errors.Is(err, unix.EINTR) { // they are being exchanged
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("list rules of chain %s: %w", name, err)
		}
		if !slices.ContainsFunc(rules, func(r *nftables.Rule) bool { return compares(r, port) }) {
			return false, nil
		}
	}
	return true, nil
}

// compares tells whether a rule asks for a port.
func compares(r *nftables.Rule, port uint16) bool {
	return slices.ContainsFunc(r.Exprs, func(e expr.Any) bool {
		cmp, ok := e.(*expr.Cmp)
		return ok && bytes.Equal(cmp.Data, binary.BigEndian.AppendUint16(nil, port))
	})
}
