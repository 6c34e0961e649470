// Package authz (decisions) says whether the policies that apply to a workload let a connection in, and why.
//
// The order is Istio's: a DENY policy that matches denies; else, where no ALLOW policy applies, the connection is
// allowed; else one ALLOW policy must match. Dry-run policies only report what they would have done.
//
// Next: internal/relay (the bytes of a connection that was let in).
package authz

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// Connection is what is known of a connection when it is checked.
type Connection struct {
	// Source is the peer's authenticated identity; the zero value: plaintext, nobody vouches for the peer.
	Source mesh.Identity
	// SourceIP is the address the destination sees.
	SourceIP netip.Addr
	// Destination is the workload's address and port, as the application listens on it.
	Destination netip.AddrPort
}

// Reason is the rule of evaluation that decided.
type Reason uint8

// The reasons of a verdict.
const (
	// ReasonNoPolicy: no policy applies, or DENY policies only and none matched. Allowed.
	ReasonNoPolicy Reason = iota
	// ReasonAllowed: an ALLOW policy matched.
	ReasonAllowed
	// ReasonDenied: a DENY policy matched.
	ReasonDenied
	// ReasonNotAllowed: ALLOW policies apply and none matched. Denied.
	ReasonNotAllowed
)

// Verdict is a decision and what led to it.
type Verdict struct {
	Allowed bool
	Reason  Reason
	// Policy is the "<namespace>/<name>" that decided; for ReasonNotAllowed the first ALLOW policy that did not match;
	// empty for ReasonNoPolicy.
	Policy string
	// Unmatched is how many ALLOW policies were tried in vain; it is counted for ReasonNotAllowed only.
	Unmatched int
	// DryRun are the dry-run policies that, enforced, would have denied (DENY matched) or let in (ALLOW matched), each
	// as "<action> <namespace>/<name>".
	DryRun []string
}

// String explains the verdict to a person.
func (v Verdict) String() string {
	var b strings.Builder
	switch v.Reason {
	case ReasonNoPolicy:
		b.WriteString("allowed: no policy refuses")
	case ReasonAllowed:
		b.WriteString("allowed by policy " + v.Policy)
	case ReasonDenied:
		b.WriteString("denied by policy " + v.Policy)
	case ReasonNotAllowed:
		b.WriteString("denied: not matched by ALLOW policy " + v.Policy)
		if v.Unmatched > 1 {
			fmt.Fprintf(&b, " nor by %d more", v.Unmatched-1)
		}
	}
	if len(v.DryRun) > 0 {
		b.WriteString(" (dry run: " + strings.Join(v.DryRun, ", ") + ")")
	}
	return b.String()
}

// Check decides on a connection under the policies that apply to its destination, in any order.
func Check(policies []*mesh.Authorization, c Connection) Verdict {
	c.SourceIP = c.SourceIP.Unmap()
	c.Destination = netip.AddrPortFrom(c.Destination.Addr().Unmap(), c.Destination.Port())
	var v Verdict
	allowed, first := "", ""
	for _, p := range policies {
		// A DENY that matched settles it; only dry-run policies still have something to report.
		if v.Reason == ReasonDenied && !p.DryRun {
			continue
		}
		matched := Matches(p, c)
		switch {
		case p.DryRun && matched:
			v.DryRun = append(v.DryRun, p.Action.String()+" "+p.Key())
		case p.DryRun:
		case p.Action == mesh.ActionDeny && matched:
			v.Reason, v.Policy = ReasonDenied, p.Key()
		case p.Action == mesh.ActionDeny:
		case matched && allowed == "":
			allowed = p.Key()
		case !matched:
			v.Unmatched++
			if first == "" {
				first = p.Key()
			}
		}
	}
	switch {
	case v.Reason == ReasonDenied:
	case allowed != "":
		v.Allowed, v.Reason, v.Policy = true, ReasonAllowed, allowed
	case first != "":
		v.Reason, v.Policy = ReasonNotAllowed, first
		return v
	default:
		v.Allowed, v.Reason = true, ReasonNoPolicy
	}
	v.Unmatched = 0
	return v
}
