package translate

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// printPolicy is a policy as a person reads it: a line each, clauses joined by "and", matches by "or".
func printPolicy(b *strings.Builder, a *mesh.Authorization, selector map[string]string) {
	fmt.Fprintf(b, "%s %s", a.Action, a.Key())
	switch a.Scope {
	case mesh.ScopeGlobal:
		b.WriteString(" everywhere")
	case mesh.ScopeNamespace:
		b.WriteString(" in its namespace")
	case mesh.ScopeSelector:
		fmt.Fprintf(b, " selected by %v", selector)
	}
	if a.DryRun {
		b.WriteString(" (dry run)")
	}
	b.WriteString("\n")
	for _, rule := range a.Rules {
		var clauses []string
		for _, clause := range rule.Clauses {
			var matches []string
			for _, m := range clause.Matches {
				matches = append(matches, printMatch(m))
			}
			clauses = append(clauses, strings.Join(matches, " or "))
		}
		if len(clauses) == 0 {
			clauses = []string{"anything"}
		}
		fmt.Fprintf(b, "  rule: %s\n", strings.Join(clauses, " and "))
	}
}

func printMatch(m mesh.Match) string {
	var parts []string
	strs := func(name string, values []mesh.StringMatch) {
		var texts []string
		for _, v := range values {
			texts = append(texts, map[mesh.MatchKind]string{
				mesh.MatchExact: v.Value, mesh.MatchPrefix: v.Value + "…", mesh.MatchSuffix: "…" + v.Value, mesh.MatchPresence: "any",
			}[v.Kind])
		}
		if len(texts) > 0 {
			parts = append(parts, name+"="+strings.Join(texts, "|"))
		}
	}
	strs("namespace", m.Namespaces)
	strs("namespace!", m.NotNamespaces)
	strs("principal", m.Principals)
	strs("principal!", m.NotPrincipals)
	add(&parts, "account", m.ServiceAccounts)
	add(&parts, "account!", m.NotServiceAccounts)
	add(&parts, "source", m.SourceIPs)
	add(&parts, "source!", m.NotSourceIPs)
	add(&parts, "destination", m.DestinationIPs)
	add(&parts, "destination!", m.NotDestinationIPs)
	add(&parts, "port", m.DestinationPorts)
	add(&parts, "port!", m.NotDestinationPorts)
	if len(parts) == 0 {
		return "(anything)"
	}
	return "(" + strings.Join(parts, " ") + ")"
}

func add[V any](parts *[]string, name string, values []V) {
	if len(values) > 0 {
		*parts = append(*parts, fmt.Sprintf("%s=%v", name, values))
	}
}

func printCondition(b *strings.Builder, c *Condition) {
	if c != nil {
		fmt.Fprintf(b, "  %s=%t %s: %s\n", c.Type, c.Status, c.Reason, c.Message)
	}
}

func printWorkload(b *strings.Builder, w *mesh.Workload) {
	fmt.Fprintf(b, "%s %s %v node=%s identity=%s", w.UID, w.Protocol, w.Addresses, w.Node, w.Identity())
	for _, flag := range []struct {
		name string
		on   bool
	}{{"healthy", w.Healthy}, {"host-network", w.HostNetwork}, {"native", w.NativeTunnel}} {
		if flag.on {
			b.WriteString(" " + flag.name)
		}
	}
	fmt.Fprintf(b, "\n  %s %s, canonical %s %s", w.WorkloadType, w.WorkloadName, w.CanonicalName, w.CanonicalRevision)
	if w.Locality != (mesh.Locality{}) {
		fmt.Fprintf(b, ", at %s/%s/%s", w.Locality.Region, w.Locality.Zone, w.Locality.Subzone)
	}
	if w.Network != "" {
		fmt.Fprintf(b, ", network %s", w.Network)
	}
	b.WriteString("\n")
	keys := slices.SortedFunc(maps.Keys(w.Services), func(a, c mesh.NamespacedHostname) int { return strings.Compare(a.String(), c.String()) })
	for _, key := range keys {
		fmt.Fprintf(b, "  serves %s %v\n", key, w.Services[key])
	}
	if w.Waypoint != nil {
		fmt.Fprintf(b, "  behind %s:%d\n", w.Waypoint.Hostname, w.Waypoint.HBONEPort)
	}
	for _, p := range w.Policies {
		fmt.Fprintf(b, "  lists %s\n", p)
	}
}
