package mesh

import "net/netip"

// Scope is what an authorization policy applies to.
type Scope uint8

// The scopes of a policy.
const (
	// ScopeGlobal: every workload of the mesh.
	ScopeGlobal Scope = iota
	// ScopeNamespace: every workload of the policy's namespace.
	ScopeNamespace
	// ScopeSelector: the workloads that list the policy by name.
	ScopeSelector
)

// Action is what a matching policy does.
type Action uint8

// The actions of a policy.
const (
	ActionAllow Action = iota
	ActionDeny
)

func (a Action) String() string {
	if a == ActionDeny {
		return "DENY"
	}
	return "ALLOW"
}

// Authorization is an L4 authorization policy. It matches a connection when any of its Rules does. One without rules
// matches nothing: as ALLOW it denies all it applies to, as DENY it denies nothing.
type Authorization struct {
	Name      string
	Namespace string
	Scope     Scope
	Action    Action
	// DryRun: the verdict is reported and not enforced.
	DryRun bool
	Rules  []Rule
}

// Key is "<namespace>/<name>", the policy's xDS resource name and the form in which workloads list it.
func (a *Authorization) Key() string { return a.Namespace + "/" + a.Name }

// Rule is one rule of the user's policy: its clauses (from, to, when) must all match.
type Rule struct{ Clauses []Clause }

// Clause matches when any of its Matches does.
type Clause struct{ Matches []Match }

// Match is a conjunction over the kinds of fact it names; within one kind, one value is enough, and none of the Not
// values may match. An empty Match matches everything.
type Match struct {
	Namespaces, NotNamespaces             []StringMatch
	Principals, NotPrincipals             []StringMatch
	ServiceAccounts, NotServiceAccounts   []ServiceAccountMatch
	SourceIPs, NotSourceIPs               []netip.Prefix
	DestinationIPs, NotDestinationIPs     []netip.Prefix
	DestinationPorts, NotDestinationPorts []uint16
}

// ServiceAccountMatch matches a source by namespace and service account, in any trust domain.
type ServiceAccountMatch struct {
	Namespace      string
	ServiceAccount string
}

// MatchKind is how a StringMatch compares.
type MatchKind uint8

// The kinds of string match.
const (
	MatchExact MatchKind = iota
	MatchPrefix
	MatchSuffix
	// MatchPresence: any non-empty string.
	MatchPresence
)

// StringMatch matches one string fact.
type StringMatch struct {
	Kind  MatchKind
	Value string
}
