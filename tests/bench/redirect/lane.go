package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"

	"github.com/fairlead-mesh/fairlead/cni/redirect"
	"github.com/fairlead-mesh/fairlead/internal/netns"
)

// lane is one way in which a pod's connections reach the proxy.
type lane struct {
	name string
	// set makes the redirection in the pod; nil where the pod is connected directly.
	set func(context.Context, *world, *pod) error
	// mode is that of Fairlead's own lanes.
	mode redirect.Mode
}

const (
	iptables = "iptables REDIRECT"
	// proxyPort is where rules redirect to.
	proxyPort = 15001
)

var lanes = []lane{
	{name: "none"},
	{name: iptables, set: byIPTables},
	{name: "nft redirect", set: byNFT},
	{name: "fairlead eBPF", set: byFairlead, mode: redirect.EBPF},
	{name: "fairlead nftables", set: byFairlead, mode: redirect.NFTables},
}

// byIPTables makes the shortest rules that redirect what the pod connects and spare what the proxy connects.
func byIPTables(_ context.Context, _ *world, p *pod) error {
	return netns.Do(p.ns, func() error {
		out, err := exec.Command("iptables", "-w", "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "!", "-o", "lo",
			"-m", "mark", "!", "--mark", fmt.Sprintf("%#x/%#x", netns.ProxyMark, netns.ProxyMarkMask),
			"-j", "REDIRECT", "--to-ports", fmt.Sprint(proxyPort)).CombinedOutput()
		if err != nil {
			return fmt.Errorf("iptables: %w: %s", err, out)
		}
		return nil
	})
}

// byNFT is the same rule in nftables.
func byNFT(_ context.Context, _ *world, p *pod) error {
	return netns.Do(p.ns, func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		table := conn.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "bench"})
		chain := conn.AddChain(&nftables.Chain{
			Name: "out", Table: table, Type: nftables.ChainTypeNAT,
			Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityNATDest,
		})
		conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{6}},
			&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
			&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(netns.ProxyMarkMask), Xor: make([]byte, 4)},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(netns.ProxyMark)},
			&expr.Immediate{Register: 1, Data: binaryutil.BigEndian.PutUint16(proxyPort)}, &expr.Redir{RegisterProtoMin: 1},
		}})
		return conn.Flush()
	})
}

// byFairlead does what the CNI agent does.
func byFairlead(ctx context.Context, w *world, p *pod) error {
	bpffs := filepath.Join(w.dir, string(p.mode))
	cfg := redirect.Config{Mode: p.mode, BPFFS: bpffs, Cgroup: p.cgroup}
	r, err := redirect.New(cfg)
	if err != nil {
		return err
	}
	w.end = append(w.end, func() error { return errors.Join(r.Remove(p.ns), r.Close(), redirect.Uninstall(cfg)) })
	if err := r.EnsureProxy(p.proxy.Process.Pid); err != nil {
		return err
	}
	target := redirect.Pod{UID: "bench", Netns: p.ns, IPs: []netip.Addr{p.addr}}
	if _, err := r.Prepare(ctx, target); err != nil {
		return err
	}
	if err := p.listen(bpffs); err != nil {
		return err
	}
	_, err = r.Ensure(ctx, target)
	return err
}
