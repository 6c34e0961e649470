package translate

import (
	"cmp"
	"slices"

	securityapi "istio.io/api/security/v1beta1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// PeerAuthentication says which plaintext a workload takes. ztunnel knows authorization policies only, so that STRICT
// becomes a DENY of connections without a peer identity: one policy that all strict workloads list, and one more for
// each PeerAuthentication that treats ports apart.

// Names of the policies made here, the same as Istio's, so that tools know them.
const (
	staticStrictName = "istio_converted_static_strict"
	convertedPrefix  = "converted_peer_authentication_"
	mtlsUnset        = securityapi.PeerAuthentication_MutualTLS_UNSET
	mtlsStrict       = securityapi.PeerAuthentication_MutualTLS_STRICT
	mtlsPermissive   = securityapi.PeerAuthentication_MutualTLS_PERMISSIVE
)

// mtlsMode is STRICT or PERMISSIVE once it is decided; DISABLE means PERMISSIVE, as HBONE is always mutual TLS.
type mtlsMode = securityapi.PeerAuthentication_MutualTLS_Mode

// PeerModes answers, for the workloads of one namespace, which of the made policies apply to them.
type PeerModes struct {
	rootNamespace string
	// namespaceMode is that of workloads which no selector names.
	namespaceMode mtlsMode
	selectors     []peerSelector
}

// peerSelector is one PeerAuthentication with a selector, and the policy it calls for ("" for none).
type peerSelector struct {
	labels map[string]string
	policy string
}

// StaticStrict is the policy that strict workloads list. It is always pushed: it applies to nothing by itself.
func StaticStrict(m Mesh) *mesh.Authorization {
	return &mesh.Authorization{
		Name: staticStrictName, Namespace: m.RootNamespace, Scope: mesh.ScopeSelector, Action: mesh.ActionDeny,
		Rules: []mesh.Rule{{Clauses: []mesh.Clause{{Matches: []mesh.Match{plaintext()}}}}},
	}
}

// plaintext matches connections whose peer has no identity.
func plaintext() mesh.Match {
	return mesh.Match{NotPrincipals: []mesh.StringMatch{{Kind: mesh.MatchPresence}}}
}

// PeerAuthentication translates the PeerAuthentications of one namespace, under those of the root namespace, into the
// modes of its workloads and the policies to push. In the root namespace itself both lists are the same.
func PeerAuthentication(m Mesh, root, namespace []*securityv1.PeerAuthentication) (PeerModes, []*mesh.Authorization) {
	modes := PeerModes{rootNamespace: m.RootNamespace}
	modes.namespaceMode = inherit(unselected(namespace), inherit(unselected(root), mtlsPermissive))
	var policies []*mesh.Authorization
	for _, pa := range oldestFirst(namespace) {
		labels := pa.Spec.GetSelector().GetMatchLabels()
		if len(labels) == 0 {
			continue
		}
		s := peerSelector{labels: labels}
		mode := inherit(pa, modes.namespaceMode)
		switch policy := portPolicy(pa, mode); {
		case policy != nil:
			policies = append(policies, policy)
			s.policy = policy.Key()
		case mode == mtlsStrict:
			s.policy = StaticStrict(m).Key()
		}
		modes.selectors = append(modes.selectors, s)
	}
	return modes, policies
}

// Policy is the key of the policy that a workload with these labels lists, or "". The oldest selector that names the
// workload decides.
func (p PeerModes) Policy(labels map[string]string) string {
	for _, s := range p.selectors {
		if selects(s.labels, labels) {
			return s.policy
		}
	}
	if p.namespaceMode == mtlsStrict {
		return p.rootNamespace + "/" + staticStrictName
	}
	return ""
}

// portPolicy is the policy of a PeerAuthentication whose ports differ from its mode; nil when none does.
func portPolicy(pa *securityv1.PeerAuthentication, mode mtlsMode) *mesh.Authorization {
	var different []uint16
	for port, mtls := range pa.Spec.GetPortLevelMtls() {
		if effective(mtls.GetMode(), mode) != mode {
			different = append(different, uint16(port))
		}
	}
	if len(different) == 0 {
		return nil
	}
	slices.Sort(different)
	match := plaintext()
	if mode == mtlsStrict {
		match.NotDestinationPorts = different
	} else {
		match.DestinationPorts = different
	}
	return &mesh.Authorization{
		Name: convertedPrefix + pa.Name, Namespace: pa.Namespace, Scope: mesh.ScopeSelector, Action: mesh.ActionDeny,
		Rules: []mesh.Rule{{Clauses: []mesh.Clause{{Matches: []mesh.Match{match}}}}},
	}
}

// unselected is the PeerAuthentication of a whole namespace, the oldest where there are several, or nil.
func unselected(all []*securityv1.PeerAuthentication) *securityv1.PeerAuthentication {
	for _, pa := range oldestFirst(all) {
		if len(pa.Spec.GetSelector().GetMatchLabels()) == 0 {
			return pa
		}
	}
	return nil
}

func inherit(pa *securityv1.PeerAuthentication, parent mtlsMode) mtlsMode {
	if pa == nil {
		return parent
	}
	return effective(pa.Spec.GetMtls().GetMode(), parent)
}

func effective(mode, parent mtlsMode) mtlsMode {
	switch mode {
	case mtlsUnset:
		return parent
	case mtlsStrict:
		return mtlsStrict
	default:
		return mtlsPermissive
	}
}

func oldestFirst(all []*securityv1.PeerAuthentication) []*securityv1.PeerAuthentication {
	return slices.SortedFunc(slices.Values(all), func(a, b *securityv1.PeerAuthentication) int {
		return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), cmp.Compare(a.Name, b.Name))
	})
}
