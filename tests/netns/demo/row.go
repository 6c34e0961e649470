package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

	"github.com/fairlead-mesh/fairlead/tests/netns/lab"
)

// The ways a call can take.
const (
	pathPlain    = "plain"
	pathHBONE    = "HBONE"
	pathNode     = "same node"
	pathWaypoint = "HBONE, waypoint, HBONE"
	pathNone     = "none"
)

// anyPolicy stands for a policy whose name the control plane chooses.
const anyPolicy = "any"

// How a call names its destination.
type target int

const (
	toPod target = iota
	toPod6
)

// expectation is what must be seen of a call.
type expectation struct {
	path string
	// lines is how many lines of access logs there are of it.
	lines int
	// readable: the payload may be read on the link; otherwise not one byte.
	readable bool
	// deniedBy names the policy that must refuse it; empty: it must succeed.
	deniedBy string
	// refused: connecting must fail at once with ECONNREFUSED.
	refused bool
}

// row is one line of the table: what was seen, and whether it is what must be.
type row struct {
	scene, from, to, path string
	source, destination   string // identities, as the proxies proved them to each other
	clear, tunnel         int64
	outcome               string
	wrong                 []string
}

func (r *row) must(ok bool, format string, args ...any) {
	if !ok {
		r.wrong = append(r.wrong, fmt.Sprintf(format, args...))
	}
}

// call makes one TCP call from pod to pod and adds its row.
func (d *demo) call(ctx context.Context, scene string, from, to *lab.Pod, how target, want expectation) error {
	name := to.Name
	if how == toPod6 {
		name += " (IPv6)"
	}
	c := lab.Call{To: to.Addr(lab.PortTCP, how == toPod6), Size: 20_000}
	o, err := d.w.Observe(ctx, from, c, want.lines)
	if err != nil {
		return fmt.Errorf("%s → %s: %w", from.Name, name, err)
	}
	d.add(scene, from, name, o, want)
	r := &d.rows[len(d.rows)-1]
	if o.Answer.OK() {
		seen := o.Answer.Last().Seen
		client := from.Addrs[how]
		r.must(strings.Contains(seen, client.String()), "the server saw the address %s, not %s", seen, client)
	}
	return nil
}

// callService makes one TCP call to the service.
func (d *demo) callService(ctx context.Context, scene string, from *lab.Pod, want expectation) error {
	o, err := d.w.Observe(ctx, from, lab.Call{To: d.orders.Addr(lab.PortTCP, false), Size: 20_000}, want.lines)
	if err != nil {
		return fmt.Errorf("%s → service orders: %w", from.Name, err)
	}
	d.add(scene, from, "service orders", o, want)
	return nil
}

// add judges an observation and adds its row.
func (d *demo) add(scene string, from *lab.Pod, to string, o lab.Observation, want expectation) {
	r := row{scene: scene, from: from.Name, to: to, path: pathOf(o), clear: o.Wire.Clear, tunnel: o.Wire.Tunnel}
	r.source, r.destination = identities(o)
	r.outcome = outcome(o)
	r.must(r.path == want.path, "the path must be %s", want.path)
	r.must(want.readable || o.Wire.Clear == 0 && o.Wire.Markers == 0, "%d bytes are readable on the link", o.Wire.Clear)
	switch {
	case want.refused:
		r.must(o.Answer.Last().Refused, "it must be refused: %s", o.Answer)
	case want.deniedBy != "":
		policy := deniedBy(o)
		r.must(o.Answer.Failed(), "it must be denied")
		r.must(policy == want.deniedBy || want.deniedBy == anyPolicy && policy != "", "it must be denied by %s", want.deniedBy)
	default:
		r.must(o.Answer.OK(), "it must succeed: %s", o.Answer)
	}
	r.must(want.path != pathHBONE || o.Wire.Tunnel > 0, "nothing was in the tunnel")
	if want.path == pathHBONE || want.path == pathNode {
		r.must(r.source == short(from.Identity()), "the source must prove to be %s", short(from.Identity()))
		r.must(want.deniedBy != "" || r.destination != "", "the destination must prove who it is")
	}
	if want.path == pathPlain && want.deniedBy == "" {
		r.must(o.Wire.Markers > 0, "the control failed: the capture could not read a plain call")
	}
	d.rows = append(d.rows, r)
}

// pathOf tells the way a call took: what the proxies logged, the source's first, or what was on the link when no proxy
// had to do with it.
func pathOf(o lab.Observation) string {
	for _, c := range []*lab.Connection{o.Outbound, o.Inbound} {
		if c != nil {
			return paths[c.Path]
		}
	}
	if o.Wire.Clear > 0 {
		return pathPlain
	}
	return pathNone
}

// paths names the paths of access logs.
var paths = map[string]string{"plain": pathPlain, "hbone": pathHBONE, "node": pathNode, "waypoint": pathWaypoint}

// identities are those that the ends of the connection proved: the source's as the destination's proxy checked it, the
// destination's as the source's proxy did.
func identities(o lab.Observation) (source, destination string) {
	if o.Inbound != nil {
		source = short(o.Inbound.SourceIdentity)
	}
	if o.Outbound != nil {
		destination = short(o.Outbound.DestinationIdentity)
	}
	return source, destination
}

func short(identity string) string {
	rest, ok := strings.CutPrefix(identity, "spiffe://cluster.local/ns/")
	if !ok {
		return identity
	}
	return strings.Replace(rest, "/sa/", "/", 1)
}

func deniedBy(o lab.Observation) string {
	if o.Inbound == nil {
		return ""
	}
	return o.Inbound.Policy
}

func outcome(o lab.Observation) string {
	switch last := o.Answer.Last(); {
	case o.Answer.OK():
		return "allowed"
	case deniedBy(o) != "":
		return "denied by " + deniedBy(o)
	case last.Refused:
		return "connection refused"
	default:
		return last.Error
	}
}

func (d *demo) failed() bool {
	for _, r := range d.rows {
		if len(r.wrong) > 0 {
			return true
		}
	}
	return false
}

const legend = `
readable:  payload that a packet capture could read on the link between the nodes. It must be 0 in the mesh; the rows
           with the path "plain" are the controls, calls before the label or by legacy, whose pod is not in the mesh.
proven:    service accounts as the proxies proved them to each other in TLS, from their access logs and metrics.
`

// print writes the table, and under it what is wrong.
func (d *demo) print(out io.Writer) {
	table := [][]string{{"", "when", "from", "to", "path", "proven source → destination", "readable", "in tunnel", "outcome"}}
	for _, r := range d.rows {
		mark, ids := "✓", "–"
		if len(r.wrong) > 0 {
			mark = "✗"
		}
		if r.source+r.destination != "" {
			ids = orDash(r.source) + " → " + orDash(r.destination)
		}
		table = append(table, []string{mark, r.scene, r.from, r.to, r.path, ids,
			fmt.Sprintf("%d B", r.clear), fmt.Sprintf("%d B", r.tunnel), r.outcome})
	}
	widths := make([]int, len(table[0]))
	for _, line := range table {
		for i, cell := range line {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	for _, line := range table {
		var b strings.Builder
		for i, cell := range line {
			b.WriteString(cell + strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell)+2))
		}
		fmt.Fprintln(out, strings.TrimRight(b.String(), " "))
	}
	fmt.Fprint(out, legend)
	for _, r := range d.rows {
		for _, why := range r.wrong {
			fmt.Fprintf(out, "✗ %s, %s → %s: %s\n", r.scene, r.from, r.to, why)
		}
	}
}

func orDash(s string) string {
	if s == "" {
		return "–"
	}
	return s
}
