package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/internal/netns"
)

// The functions of this file act on the network namespace of the calling thread.

// ensureChains makes the table hold exactly these chains, in one transaction.
func ensureChains(chains []Chain) error {
	conn, exists, err := openTable()
	if err != nil {
		return err
	}
	return putChains(conn, exists, chains)
}

// beginTable is ensureChains where there is no table yet, and nothing elsewhere.
func beginTable(chains []Chain) error {
	conn, exists, err := openTable()
	if err != nil || exists {
		return err
	}
	return putChains(conn, exists, chains)
}

// replaceChains is ensureChains where there is a table already, and nothing elsewhere.
func replaceChains(chains []Chain) error {
	conn, exists, err := openTable()
	if err != nil || !exists {
		return err
	}
	return putChains(conn, exists, chains)
}

// removeTable takes the table away, if there is one.
func removeTable() error {
	conn, exists, err := openTable()
	if err != nil || !exists {
		return err
	}
	conn.DelTable(table())
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("remove nftables table %s: %w", TableName, err)
	}
	return nil
}

// heldChains tells whether the table holds exactly these chains.
func heldChains(want []Chain) (bool, error) {
	conn, exists, err := openTable()
	if err != nil || !exists {
		return false, err
	}
	all, err := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return false, fmt.Errorf("list chains: %w", err)
	}
	have := map[string]*nftables.Chain{}
	for _, c := range all {
		if c.Table.Name == TableName {
			have[c.Name] = c
		}
	}
	if len(have) != len(want) {
		return false, nil
	}
	for _, w := range want {
		c := have[w.Name]
		if c == nil || string(c.Type) != w.Kind || c.Hooknum == nil || uint32(*c.Hooknum) != w.Hook ||
			c.Priority == nil || int32(*c.Priority) != w.Priority {
			return false, nil
		}
		rules, err := conn.GetRules(table(), c)
		if err != nil {
			return false, fmt.Errorf("list rules of chain %s: %w", w.Name, err)
		}
		if !slices.EqualFunc(w.Steps, rules, func(s Step, r *nftables.Rule) bool { return sameExprs(s.exprs(), r.Exprs) }) {
			return false, nil
		}
	}
	return true, nil
}

// sameExprs compares what was asked for with what the kernel gave back. How the latter was decoded has lost the
// registers of what looks at or marks connections.
func sameExprs(asked, got []expr.Any) bool {
	return slices.EqualFunc(asked, got, func(a, g expr.Any) bool {
		wanted, ok := a.(*expr.Ct)
		if !ok {
			return reflect.DeepEqual(a, g)
		}
		ct, ok := g.(*expr.Ct)
		return ok && ct.Key == wanted.Key
	})
}

func table() *nftables.Table {
	return &nftables.Table{Family: nftables.TableFamilyINet, Name: TableName}
}

// openTable is a connection to the kernel, and whether it has the table.
func openTable() (conn *nftables.Conn, exists bool, err error) {
	if conn, err = nftables.New(); err != nil {
		return nil, false, err
	}
	if _, err = conn.ListTableOfFamily(TableName, nftables.TableFamilyINet); errors.Is(err, unix.ENOENT) {
		return conn, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("look for nftables table %s: %w", TableName, err)
	}
	return conn, true, nil
}

// putChains makes the table, or makes it anew if it exists.
func putChains(conn *nftables.Conn, exists bool, chains []Chain) error {
	if exists {
		conn.DelTable(table())
	}
	t := conn.AddTable(table())
	for _, c := range chains {
		addChain(conn, t, c)
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("make nftables table %s: %w", TableName, err)
	}
	return nil
}

func addChain(conn *nftables.Conn, t *nftables.Table, c Chain) {
	made := conn.AddChain(&nftables.Chain{
		Name: c.Name, Table: t, Type: nftables.ChainType(c.Kind),
		Hooknum: nftables.ChainHookRef(nftables.ChainHook(c.Hook)), Priority: nftables.ChainPriorityRef(nftables.ChainPriority(c.Priority)),
	})
	for _, s := range c.Steps {
		conn.AddRule(&nftables.Rule{Table: t, Chain: made, Exprs: s.exprs()})
	}
}

// register is the kernel's general register that all comparisons use.
const register = 1

// directionReply is what the kernel says of a packet against its connection's direction (IP_CT_DIR_REPLY).
const directionReply = 1

// exprs are a step in the kernel's terms: conditions, then what is done.
func (s Step) exprs() []expr.Any {
	var all []expr.Any
	if s.In != "" {
		all = append(all, meta(expr.MetaKeyIIFNAME), equal(deviceName(s.In)))
	}
	if s.Out != "" {
		all = append(all, meta(expr.MetaKeyOIFNAME), equal(deviceName(s.Out)))
	}
	all = append(all, matchNetwork(s.Source, 12, 8)...)
	all = append(all, matchNetwork(s.Destination, 16, 24)...)
	if s.Protocol != 0 {
		all = append(all, meta(expr.MetaKeyL4PROTO), equal([]byte{s.Protocol}))
	}
	if s.Port != 0 {
		all = append(all, payload(expr.PayloadBaseTransportHeader, 2, 2), equal(binaryutil.BigEndian.PutUint16(s.Port)))
	}
	if s.Opens {
		const flags, syn, ack = 13, 0x02, 0x10
		all = append(all, payload(expr.PayloadBaseTransportHeader, flags, 1), masked([]byte{syn | ack}), equal([]byte{syn}))
	}
	if s.Proxy {
		all = append(all, meta(expr.MetaKeyMARK), masked(number(netns.ProxyMarkMask)), equal(number(netns.ProxyMark)))
	}
	if s.Answers {
		all = append(all,
			&expr.Ct{Key: expr.CtKeyDIRECTION, Register: register}, equal([]byte{directionReply}),
			&expr.Ct{Key: expr.CtKeyMARK, Register: register}, equal(number(netns.RedirectMark)))
	}
	return append(all, s.verdict()...)
}

func (s Step) verdict() []expr.Any {
	switch s.Do {
	case Drop:
		return []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}}
	case Reset:
		return []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}}
	case Redirect:
		return []expr.Any{
			&expr.Immediate{Register: register, Data: binaryutil.BigEndian.PutUint16(s.To)},
			&expr.Redir{RegisterProtoMin: register, RegisterProtoMax: register, Flags: unix.NF_NAT_RANGE_PROTO_SPECIFIED},
		}
	case NoteConnection:
		return []expr.Any{
			&expr.Immediate{Register: register, Data: number(netns.RedirectMark)},
			&expr.Ct{Key: expr.CtKeyMARK, Register: register, SourceRegister: true},
		}
	case Mark:
		return []expr.Any{
			&expr.Immediate{Register: register, Data: number(netns.RedirectMark)},
			&expr.Meta{Key: expr.MetaKeyMARK, Register: register, SourceRegister: true},
		}
	}
	return []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}
}

// matchNetwork compares an address at its offset in an IPv4 or IPv6 header; the zero network matches all.
func matchNetwork(n netip.Prefix, offset4, offset6 uint32) []expr.Any {
	if !n.IsValid() {
		return nil
	}
	family, offset, size := byte(unix.NFPROTO_IPV4), offset4, uint32(4)
	if n.Addr().Is6() {
		family, offset, size = unix.NFPROTO_IPV6, offset6, 16
	}
	all := []expr.Any{meta(expr.MetaKeyNFPROTO), equal([]byte{family}), payload(expr.PayloadBaseNetworkHeader, offset, size)}
	if n.Bits() < n.Addr().BitLen() {
		ones := make([]byte, size)
		for i := range n.Bits() {
			ones[i/8] |= 0x80 >> (i % 8)
		}
		all = append(all, masked(ones))
	}
	return append(all, equal(n.Masked().Addr().AsSlice()))
}

func meta(key expr.MetaKey) expr.Any { return &expr.Meta{Key: key, Register: register} }

func payload(base expr.PayloadBase, offset, size uint32) expr.Any {
	return &expr.Payload{DestRegister: register, Base: base, Offset: offset, Len: size}
}

func masked(mask []byte) expr.Any {
	return &expr.Bitwise{SourceRegister: register, DestRegister: register, Len: uint32(len(mask)), Mask: mask, Xor: make([]byte, len(mask))}
}

func equal(to []byte) expr.Any { return &expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: to} }

// number is a mark as the kernel compares it.
func number(n uint32) []byte { return binaryutil.NativeEndian.PutUint32(n) }

// deviceName fills the kernel's room for a name, so that no longer one matches.
func deviceName(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}
